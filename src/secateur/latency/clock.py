"""Clocks: what a forward pass costs on a device, undisturbed by what else the machine does where that is possible."""

from __future__ import annotations

import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import LatencyError

__all__ = ["Clock", "clock_of", "processor"]


class Clock(ABC):
    """Marks moments while a model runs and says afterwards how far apart they were.

    Attributes:
        unit_of: what one reading is a time of, in words.
    """

    unit_of: str

    @abstractmethod
    def mark(self) -> Any:
        """This moment."""

    @abstractmethod
    def read(self, marks: Sequence[Any]) -> NDArray[np.float64]:
        """Nanoseconds from the first mark to each."""


class ThreadTime(Clock):
    """Processor time of the calling thread, in which torch does everything where it has one thread only."""

    unit_of = "processor time of one thread"

    def mark(self) -> int:
        """This moment."""
        return time.thread_time_ns()

    def read(self, marks: Sequence[Any]) -> NDArray[np.float64]:
        """Nanoseconds from the first mark to each."""
        return np.array([mark - marks[0] for mark in marks], dtype=np.float64)


class WallTime(ThreadTime):
    """The clock on the wall."""

    unit_of = "wall time"

    def mark(self) -> int:
        """This moment."""
        return time.perf_counter_ns()


class CudaTime(Clock):
    """Events in the stream of a CUDA device, waiting between kernels included.

    Args:
        device: the device.
    """

    unit_of = "time in the device's stream"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """This moment, as the stream reaches it."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, marks: Sequence[Any]) -> NDArray[np.float64]:
        """Nanoseconds from the first mark to each."""
        torch.cuda.synchronize(self._device)
        return np.array([1e6 * marks[0].elapsed_time(mark) for mark in marks], dtype=np.float64)


def clock_of(device: torch.device) -> Clock:
    """The clock for a device.

    On the processor that is the thread's own time where torch has one thread, for what others do on the machine does
    not count there; with several threads, and on Windows, whose thread time ticks too slowly, it is wall time.

    Raises:
        LatencyError: there is no such device here, or no clock for it.

    Example:
        >>> clock = clock_of(torch.device("cpu"))
        >>> marks = [clock.mark(), clock.mark()]
        >>> bool(clock.read(marks)[1] >= 0)
        True
    """
    if device.type == "cpu":
        return ThreadTime() if torch.get_num_threads() == 1 and sys.platform != "win32" else WallTime()
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LatencyError(f"device {str(device)!r}: torch finds no CUDA device here; device='cpu' is always there")
        return CudaTime(device)
    raise LatencyError(f"device {str(device)!r} has no clock here; expected cpu or cuda")


def processor(device: torch.device) -> str:
    """What a device is called by its maker.

    Example:
        >>> processor(torch.device("cpu")) != ""
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or platform.machine()
