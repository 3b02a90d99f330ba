"""CIFAR-10 in both of its forms, and every way in which its files can be wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.errors import SecateurError
from secateur.recipes import cifar
from secateur.recipes.cifar import BINARY, SHEETS, cifar10

ALL = (*BINARY[0], BINARY[1])


def pixels() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (24, 3, 32, 32)).astype(np.uint8)


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """Four images in each of the six files."""
    for number, name in enumerate(ALL):
        rows = [bytes([i % 10]) + pixels()[i].tobytes() for i in range(4 * number, 4 * number + 4)]
        (tmp_path / name).write_bytes(b"".join(rows))
    return tmp_path


@pytest.fixture
def sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images as lossless sheets of 2 x 2."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(cifar, "ROWS", 2)
    monkeypatch.setattr(cifar, "BATCH", 4)
    for number, name in enumerate((*SHEETS[0][:-1], SHEETS[1][0])):
        four = pixels()[4 * number : 4 * number + 4].transpose(0, 2, 3, 1)
        sheet = np.concatenate([np.concatenate(list(four[i : i + 2]), axis=1) for i in (0, 2)])
        image.fromarray(sheet).save(tmp_path / name, lossless=True)
    labels = (np.arange(24) % 10).astype(np.uint8)
    np.save(tmp_path / SHEETS[0][-1], labels[:20])
    np.save(tmp_path / SHEETS[1][1], labels[20:])
    return tmp_path


@pytest.mark.parametrize("form", ["binary", "sheets"])
def test_both_forms_give_the_same_images_standardised_channel_by_channel(form: str, request: pytest.FixtureRequest):
    found = cifar10(request.getfixturevalue(form))
    assert found.y.tolist() + found.y_test.tolist() == [i % 10 for i in range(24)]
    x = pixels().astype(np.float64)
    mean = x[:20].mean((0, 2, 3), keepdims=True)
    expected = (x - mean) / x[:20].std((0, 2, 3), keepdims=True)
    assert torch.cat([found.x, found.x_test]).numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("where", [None, "nothing"])
def test_without_files_all_that_are_expected_are_named(where: str | None, tmp_path: Path):
    with pytest.raises(SecateurError) as caught:
        cifar10(None if where is None else tmp_path / where)
    assert all(name in str(caught.value) for name in (*ALL, *SHEETS[0], *SHEETS[1]))


def test_one_missing_file_is_named_as_the_missing_one(binary: Path):
    (binary / "data_batch_3.bin").unlink()
    with pytest.raises(SecateurError, match=r"lacks data_batch_3\.bin; expected"):
        cifar10(binary)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "expected a multiple of 3073"),
        (lambda raw: b"", "0 bytes, expected a multiple of 3073"),
        (lambda raw: b"\x0b" + raw[1:], "labels from 1 to 11"),
    ],
)
def test_corrupt_binary_files_are_refused(binary: Path, damage: Callable[[bytes], bytes], message: str):
    path = binary / "test_batch.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SecateurError, match=message):
        cifar10(binary)


@pytest.mark.parametrize("name", [SHEETS[0][0], SHEETS[1][1]])
def test_corrupt_sheets_and_labels_are_refused_by_name(sheets: Path, name: str):
    (sheets / name).write_bytes((sheets / name).read_bytes()[:40])
    with pytest.raises(SecateurError, match=name):
        cifar10(sheets)


def test_the_real_images_are_there(data_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("PIL")
    folder = data_folder("cifar10")
    monkeypatch.setattr(cifar, "SHEETS", ((SHEETS[0][0], SHEETS[0][-1]), SHEETS[1]))
    with pytest.raises(SecateurError, match="10000 training images and 50000 labels"):
        cifar10(folder)
