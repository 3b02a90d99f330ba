"""CIFAR-10 from files that hold nothing but pixels and labels: no pickle is read.

Index conventions: images are uint8 ``(N, 3, 32, 32)`` until they are standardised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import SecateurError
from secateur.recipes.images import Images

__all__ = ["BINARY", "SHEETS", "cifar10"]

#: The published binary version: each image is its label and 3 x 32 x 32 bytes.
BINARY = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"
#: Lossless sheets of 100 x 100 images in the order of the published batches, and the labels.
SHEETS = (
    (*(f"data_batch_{number}.webp" for number in range(1, 6)), "train_labels.npy"),
    ("test_batch.webp", "test_labels.npy"),
)
#: Images of one file, and the side of an image and of a sheet in images.
BATCH, SIDE, ROWS = 10_000, 32, 100

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def cifar10(directory: Path | None) -> Images:
    """The 50,000 training and 10,000 test images of 3 x 32 x 32, standardised channel by channel.

    Args:
        directory: holds the six files of the binary version, or sheets and labels.

    Raises:
        SecateurError: files are missing (the message names all that are expected), or corrupt, or Pillow is.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    expected = f"{', '.join((*BINARY[0], BINARY[1]))} (the binary version), or {', '.join((*SHEETS[0], *SHEETS[1]))}"
    if directory is None:
        raise SecateurError(f"data set 'cifar10': no directory was given; expected --data-dir DIR with {expected}")
    kinds: Sequence[tuple[Sequence[str], Callable[[Path], tuple[Part, Part]]]] = (
        ((*BINARY[0], BINARY[1]), _from_binary),
        ((*SHEETS[0], *SHEETS[1]), _from_sheets),
    )
    missing = {read: [name for name in names if not (directory / name).is_file()] for names, read in kinds}
    read = min(missing, key=lambda kind: len(missing[kind]))
    if missing[read]:
        there = "" if directory.is_dir() else " (there is no such directory)"
        raise SecateurError(
            f"data set 'cifar10': {directory}{there} lacks {', '.join(missing[read])}; expected there {expected}: give "
            "their directory by --data-dir"
        )
    (x, y), (x_test, y_test) = read(directory)
    for part, labels, n in (("training", y, len(x)), ("test", y_test, len(x_test))):
        if len(labels) != n or labels.min() < 0 or labels.max() > 9:
            raise SecateurError(
                f"data set 'cifar10': {directory}: {n} {part} images and {len(labels)} labels from {labels.min()} to "
                f"{labels.max()}; expected as many, from 0 to 9; fetch the files again"
            )
    mean = x.mean(axis=(0, 2, 3), dtype=np.float64)
    deviation = np.sqrt(np.square(x, dtype=np.uint16).mean(axis=(0, 2, 3), dtype=np.float64) - mean**2)
    low, scale = (torch.tensor(each, dtype=torch.float32).view(3, 1, 1) for each in (mean, deviation))
    pixels, test = ((torch.from_numpy(each).float() - low) / scale for each in (x, x_test))
    return Images("cifar10", pixels, torch.from_numpy(y), test, torch.from_numpy(y_test))


def _from_binary(directory: Path) -> tuple[Part, Part]:
    def batch(name: str) -> Part:
        raw = np.fromfile(directory / name, dtype=np.uint8)
        if not len(raw) or len(raw) % (1 + 3 * SIDE**2):
            raise SecateurError(
                f"{directory / name}: {len(raw)} bytes, expected a multiple of {1 + 3 * SIDE**2}, one label and "
                "3 x 32 x 32 pixels for each image; fetch the file again"
            )
        rows = raw.reshape(-1, 1 + 3 * SIDE**2)
        return rows[:, 1:].reshape(-1, 3, SIDE, SIDE), rows[:, 0].astype(np.int64)

    parts = [batch(name) for name in BINARY[0]]
    return (np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])), batch(BINARY[1])


def _from_sheets(directory: Path) -> tuple[Part, Part]:
    try:
        from PIL import Image
    except ImportError as error:
        raise SecateurError(
            f"data set 'cifar10': its sheets need Pillow ({error}); run `python -m pip install pillow`, or use the "
            f"binary version: {', '.join((*BINARY[0], BINARY[1]))}"
        ) from error

    def sheet(name: str) -> NDArray[np.uint8]:
        path = directory / name
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise SecateurError(f"{path}: cannot be read as a picture ({error}); fetch the file again") from error
        if pixels.shape != (ROWS * SIDE, ROWS * SIDE, 3):
            raise SecateurError(
                f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {ROWS * SIDE} x {ROWS * SIDE}; fetch "
                "the file again"
            )
        images = pixels.reshape(ROWS, SIDE, ROWS, SIDE, 3).transpose(0, 2, 4, 1, 3)
        return np.ascontiguousarray(images.reshape(BATCH, 3, SIDE, SIDE))

    def labels(name: str) -> NDArray[np.int64]:
        try:
            found = np.load(directory / name, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise SecateurError(f"{directory / name}: cannot be read ({error}); fetch the file again") from error
        return np.asarray(found, dtype=np.int64).reshape(-1)

    x = np.concatenate([sheet(name) for name in SHEETS[0][:-1]])
    return (x, labels(SHEETS[0][-1])), (sheet(SHEETS[1][0]), labels(SHEETS[1][1]))
