"""Data sets: sizes, splits, and every way in which files can be wrong."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.errors import SecateurError
from secateur.recipes.data import MNIST_FILES, batches, digits, folds, load, mnist, read_idx


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """Twenty training and ten test images in the published format, half of the files compressed."""
    random = np.random.RandomState(0)
    for part, n in (("train", 20), ("t10k", 10)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(random.randint(0, 256, (n, 28, 28))))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(n) % 10)))
    return tmp_path


def test_digits_have_a_fixed_stratified_split_of_1347_and_450():
    split = digits()
    assert split.x.shape == (1347, 1, 8, 8)
    assert split.x_test.shape == (450, 1, 8, 8)
    counts = split.y_test.bincount()
    whole = counts + split.y.bincount()
    assert ((counts - whole * 450 / 1797).abs() < 1).all()


def test_training_pixels_are_standardised_and_the_test_set_does_not_enter():
    split = digits(fold=0)
    assert split.x.mean().item() == pytest.approx(0, abs=1e-5)
    assert split.x.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert split.x_test.mean().item() != pytest.approx(0, abs=1e-5)


def test_five_folds_are_disjoint_and_cover_every_image():
    labels = np.repeat(np.arange(10), 179)
    parts = folds(labels, 5, seed=3)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1790))
    for part in parts:
        assert len(part) == 358
        assert {35, 36} >= set(np.bincount(labels[part]).tolist())


def test_another_seed_deals_another_split():
    labels = np.repeat(np.arange(10), 20)
    assert np.array_equal(folds(labels, 5, seed=0)[0], folds(labels, 5, seed=0)[0])
    assert not np.array_equal(folds(labels, 5, seed=0)[0], folds(labels, 5, seed=1)[0])


@pytest.mark.parametrize("n", [1, 8])
def test_impossible_numbers_of_folds_are_refused(n: int):
    with pytest.raises(SecateurError, match="expected 2 <= n <= 7"):
        folds(np.zeros(7, dtype=np.int64), n, seed=0)


def test_a_fold_outside_its_range_is_refused():
    with pytest.raises(SecateurError, match="fold=5 of 5"):
        digits(fold=5)


def test_batches_are_a_permutation_in_nearly_equal_pieces():
    pieces = list(batches(1347, 64, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(pieces).tolist()) == list(range(1347))
    assert {len(piece) for piece in pieces} == {64, 65}


def test_batches_depend_on_the_generator_alone():
    first = torch.cat(list(batches(50, 8, torch.Generator().manual_seed(1))))
    torch.manual_seed(99)
    assert torch.equal(first, torch.cat(list(batches(50, 8, torch.Generator().manual_seed(1)))))


def test_mnist_is_read_plain_and_compressed(tiny_mnist: Path):
    split = load("mnist", tiny_mnist)
    assert split.x.shape == (20, 1, 28, 28)
    assert split.x_test.shape == (10, 1, 28, 28)
    assert split.y.tolist() == [i % 10 for i in range(20)]
    raw = np.frombuffer((tiny_mnist / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).astype(np.float64)
    expected = (raw - raw.mean()) / raw.std()
    assert np.allclose(split.x.numpy().ravel(), expected, atol=1e-6)


def test_missing_files_are_all_named(tmp_path: Path):
    with pytest.raises(SecateurError) as caught:
        mnist(tmp_path / "nothing")
    assert all(name in str(caught.value) for name in MNIST_FILES)
    assert "no such directory" in str(caught.value)


def test_one_missing_file_is_named_as_the_missing_one(tiny_mnist: Path):
    (tiny_mnist / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(SecateurError, match=r"lacks t10k-images-idx3-ubyte;"):
        mnist(tiny_mnist)


def test_mnist_without_a_directory_says_which_files_it_needs():
    with pytest.raises(SecateurError, match="--data-dir DIR with the files train-images-idx3-ubyte"):
        load("mnist")


def corrupt(raw: bytes) -> dict[str, bytes]:
    return {
        "wrong magic": b"\x89PNG" + raw[4:],
        "empty": b"",
        "half a header": raw[:7],
        "too short": raw[:-1],
        "too long": raw + b"\0",
    }


@pytest.mark.parametrize("kind", ["wrong magic", "empty", "half a header", "too short", "too long"])
def test_corrupt_plain_files_are_refused_by_name(tmp_path: Path, kind: str):
    path = tmp_path / "train-labels-idx1-ubyte"
    whole = idx(np.arange(10))
    path.write_bytes(whole)
    assert read_idx(path, 1).tolist() == list(range(10))
    path.write_bytes(corrupt(whole)[kind])
    with pytest.raises(SecateurError, match="train-labels-idx1-ubyte"):
        read_idx(path, 1)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"no gzip" + raw, lambda raw: b""])
def test_corrupt_compressed_files_are_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]):
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(gzip.compress(idx(np.arange(100)))))
    with pytest.raises(SecateurError, match=r"train-labels-idx1-ubyte\.gz"):
        read_idx(path, 1)


def test_a_flipped_bit_in_a_compressed_file_is_found(tmp_path: Path):
    raw = bytearray(gzip.compress(idx(np.random.RandomState(0).randint(0, 256, 1000))))
    raw[len(raw) // 2] ^= 0x10
    path = tmp_path / "x.gz"
    path.write_bytes(bytes(raw))
    with pytest.raises(SecateurError, match=r"x\.gz"):
        read_idx(path, 1)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((19, 28, 28)), "19 images and 20 labels"),
        ("train-images-idx3-ubyte", np.zeros((20, 28, 27)), "28 x 27 pixels"),
        ("t10k-labels-idx1-ubyte", np.full(10, 11), "a label 11"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tiny_mnist: Path, name: str, array: np.ndarray, message: str):
    (tiny_mnist / f"{name}.gz").unlink(missing_ok=True)
    (tiny_mnist / name).write_bytes(idx(array))
    with pytest.raises(SecateurError, match=message):
        mnist(tiny_mnist)


def test_an_unknown_data_set_is_refused_with_the_list_of_those_that_exist():
    with pytest.raises(SecateurError, match="unknown data set 'cifar'; there are: digits, mnist, cifar10"):
        load("cifar")
