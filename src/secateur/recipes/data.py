"""The data sets of the recipes, whole in memory, and seeded batches of them.

Index conventions: ``B`` examples, ``C`` channels, ``H`` x ``W`` pixels. Images are float32 ``(B, C, H, W)``,
labels int64 ``(B,)``.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import SecateurError
from secateur.recipes.cifar import cifar10
from secateur.recipes.images import Images

__all__ = ["DATA_SETS", "DataSet", "batches", "digits", "folds", "load", "mnist", "n_batches", "read_idx"]

#: The four files of MNIST, as published: name without ``.gz`` -> number of dimensions.
MNIST_FILES: Mapping[str, int] = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}
#: Type byte of unsigned bytes in an idx header; the only type that MNIST uses.
IDX_UBYTE = 0x08
#: Quarters of the digits, of which one (450 of 1,797) is the test set of the fixed split.
DIGITS_QUARTERS = 4


def _standardised(name: str, x: NDArray[np.uint8], y: NDArray[np.int64], test: NDArray[np.bool_]) -> Images:
    train = x[~test]
    # Numpy's float64 sums: torch's depend on the number of threads, and the table must not.
    mean = float(train.mean(dtype=np.float64))
    deviation = math.sqrt(float(np.square(train, dtype=np.uint16).mean(dtype=np.float64)) - mean**2)
    pixels = torch.from_numpy(x.astype(np.float32)).sub_(mean).div_(deviation).unsqueeze(1)
    labels, held_out = torch.from_numpy(y), torch.from_numpy(test)
    return Images(name, pixels[~held_out], labels[~held_out], pixels[held_out], labels[held_out])


def folds(labels: NDArray[np.int64], n: int, seed: int) -> list[NDArray[np.int64]]:
    """Test indices of ``n`` stratified folds: disjoint, together everything, each class spread evenly.

    Each class is shuffled and dealt out in turn, the next class going on where the last one stopped, so that
    both the folds' sizes and each class's counts in them differ by at most one.

    Args:
        labels: ``(B,)`` class of each example.
        n: number of folds, at least 2 and at most ``B``.
        seed: of the shuffle.

    Raises:
        SecateurError: ``n`` is outside its range.

    Example:
        >>> parts = folds(np.array([0, 0, 0, 1, 1, 1, 1]), 2, seed=0)
        >>> [len(part) for part in parts]
        [4, 3]
    """
    if not 2 <= n <= len(labels):
        raise SecateurError(f"folds: n={n} for {len(labels)} examples; expected 2 <= n <= {len(labels)}")
    # The legacy generator's streams are frozen by numpy's own promise, so the split is the same for ever.
    shuffle = np.random.RandomState(seed)
    dealt = np.concatenate([shuffle.permutation(np.flatnonzero(labels == kind)) for kind in np.unique(labels)])
    return [np.sort(dealt[start::n]) for start in range(n)]


def digits(fold: int | None = None, n_folds: int = 5, seed: int = 0) -> Images:
    """Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels.

    Args:
        fold: None for the fixed stratified split of 1,347 / 450; otherwise which of ``n_folds`` is the test set.
        n_folds: number of folds, where ``fold`` is given.
        seed: of the shuffle behind folds; the fixed split ignores it.

    Raises:
        SecateurError: scikit-learn is not installed, or ``fold`` is outside ``[0, n_folds)``.

    Source:
        E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (its test part).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SecateurError(
            "data set 'digits': it ships with scikit-learn, which is not installed; "
            'run `pip install "secateur[demo]"` or choose --data mnist'
        ) from error
    bunch = load_digits()
    y = np.asarray(bunch.target, dtype=np.int64)
    if fold is None:
        held_out = folds(y, DIGITS_QUARTERS, seed=0)[0]
    elif 0 <= fold < n_folds:
        held_out = folds(y, n_folds, seed)[fold]
    else:
        raise SecateurError(f"data set 'digits': fold={fold} of {n_folds}; expected 0 <= fold < {n_folds}")
    test = np.zeros(len(y), dtype=np.bool_)
    test[held_out] = True
    return _standardised("digits", np.asarray(bunch.images, dtype=np.uint8), y, test)


def read_idx(path: Path, n_dims: int) -> NDArray[np.uint8]:
    """One idx file of unsigned bytes, plain or compressed by gzip, every size checked.

    Args:
        path: the file; ``.gz`` at its end means gzip.
        n_dims: expected number of dimensions (3 for images, 1 for labels).

    Raises:
        SecateurError: the file cannot be read, is not an idx file of ``n_dims`` dimensions of bytes, or holds
            more or fewer bytes than its header says.

    Source:
        The format as described at the end of the page "The MNIST database of handwritten digits".
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise SecateurError(f"{path}: cannot be read ({error}); fetch the file again") from error
    header = 4 + 4 * n_dims
    expected_magic = bytes([0, 0, IDX_UBYTE, n_dims])
    if raw[:4] != expected_magic:
        raise SecateurError(
            f"{path}: not an idx file of {n_dims} dimensions of bytes: it starts with 0x{raw[:4].hex() or '-'}, "
            f"expected 0x{expected_magic.hex()}; fetch the file again"
        )
    if len(raw) < header:
        raise SecateurError(f"{path}: the header ends after {len(raw)} of {header} bytes; fetch the file again")
    sizes = struct.unpack(f">{n_dims}I", raw[4:header])
    if len(raw) - header != math.prod(sizes):
        raise SecateurError(
            f"{path}: {len(raw) - header} bytes of data, but its header says {' x '.join(map(str, sizes))} = "
            f"{math.prod(sizes)}; fetch the file again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(sizes)


def mnist(directory: Path) -> Images:
    """The MNIST digits from the four published idx files: 60,000 training and 10,000 test images of 28 x 28.

    Args:
        directory: holds the four files, each plain or with ``.gz`` at its end.

    Raises:
        SecateurError: files are missing (the message names all that are expected), corrupt, or do not belong together.
    """
    found: dict[str, Path] = {}
    for name in MNIST_FILES:
        for path in (directory / name, directory / f"{name}.gz"):
            if path.is_file():
                found.setdefault(name, path)
    if missing := [name for name in MNIST_FILES if name not in found]:
        there = "" if directory.is_dir() else " (there is no such directory)"
        raise SecateurError(
            f"data set 'mnist': {directory}{there} lacks {', '.join(missing)}; expected the files "
            f"{', '.join(MNIST_FILES)} there, each plain or with .gz at its end: give their directory by --data-dir"
        )
    x, y = _mnist_part(directory, found, "train")
    x_test, y_test = _mnist_part(directory, found, "t10k")
    test = np.repeat([False, True], [len(y), len(y_test)])
    return _standardised("mnist", np.concatenate([x, x_test]), np.concatenate([y, y_test]).astype(np.int64), test)


def _mnist_part(directory: Path, found: Mapping[str, Path], part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    x, y = read_idx(found[images], MNIST_FILES[images]), read_idx(found[labels], MNIST_FILES[labels])
    problems = []
    if len(x) != len(y) or not len(y):
        problems.append(f"{len(x)} images and {len(y)} labels, expected as many, at least one")
    if x.shape[1:] != (28, 28):
        problems.append(f"images of {x.shape[1]} x {x.shape[2]} pixels, expected 28 x 28")
    if len(y) and y.max() > 9:
        problems.append(f"a label {y.max()}, expected 0 to 9")
    if problems:
        raise SecateurError(f"data set 'mnist': {directory}: {part}: {'; '.join(problems)}; fetch the files again")
    return x, y


@dataclass(frozen=True)
class DataSet:
    """One row of the table of data sets.

    Args:
        shape: of one image, ``(C, H, W)``.
        load: reads it from a directory; ``needs_directory`` says whether that may be None.
        needs_directory: whether the files have to be pointed to.
    """

    shape: tuple[int, int, int]
    load: Callable[[Path | None], Images]
    needs_directory: bool


def _mnist(directory: Path | None) -> Images:
    if directory is None:
        raise SecateurError(
            f"data set 'mnist': no directory was given; expected --data-dir DIR with the files "
            f"{', '.join(MNIST_FILES)}, each plain or with .gz at its end"
        )
    return mnist(directory)


#: Every data set by name. A new one is one row here.
DATA_SETS: Mapping[str, DataSet] = {
    "digits": DataSet((1, 8, 8), lambda directory: digits(), needs_directory=False),
    "mnist": DataSet((1, 28, 28), _mnist, needs_directory=True),
    "cifar10": DataSet((3, 32, 32), cifar10, needs_directory=True),
}


def load(name: str, directory: Path | None = None) -> Images:
    """The data set ``name`` of ``DATA_SETS``.

    Raises:
        SecateurError: there is no such data set, or its files are missing or corrupt.
    """
    if name not in DATA_SETS:
        raise SecateurError(f"unknown data set {name!r}; there are: {', '.join(DATA_SETS)}")
    return DATA_SETS[name].load(directory)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of index batches: a fresh permutation of ``range(n)`` in pieces of nearly equal length.

    The pieces differ by at most one example: a remainder of three would give BatchNorm three examples to
    estimate a variance from.

    Args:
        n: number of examples.
        size: intended examples in a batch; there are ``n_batches(n, size)``, ``round(n / size)`` but at least one.
        generator: CPU generator that draws the permutation.

    Example:
        >>> [len(batch) for batch in batches(10, 4, torch.Generator().manual_seed(0))]
        [5, 5]
    """
    yield from torch.randperm(n, generator=generator).tensor_split(n_batches(n, size))


def n_batches(n: int, size: int) -> int:
    """How many batches :func:`batches` makes."""
    return max(1, round(n / size))
