"""What all tests share: fixed seeds, one thread, data that may be missing, and torchvision on a CPU build of torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Files that tests share hold no tests, and some need packages of the extra "zoo": no examples are looked for in them.
collect_ignore = [
    str(path) for path in Path(__file__).parent.rglob("*.py") if not path.name.startswith(("test_", "conftest"))
]

# Kept alive for the whole run: the definitions go with the object.
_torchvision_operators: list[torch.library.Library] = []


def _declare_torchvision_operators() -> None:
    """Declare the two operators without which a torchvision built for CUDA cannot be imported on a CPU torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_operators.append(library)


@pytest.fixture(scope="session")
def torchvision_imports() -> None:
    """Ask for this before a test imports torchvision or timm; on a complete installation it changes nothing."""
    with contextlib.suppress(Exception):
        _declare_torchvision_operators()


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """``data_folder("mnist")`` is the folder of a data set; the test is skipped where there is none."""
    root = Path(os.environ.get("SECATEUR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            pytest.skip(f"no data set {name!r} in {root}; name the folder that holds it in SECATEUR_DATA")
        return folder

    return find


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """The same numbers in every run and in every order of the tests."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
