"""What the allocator of the process does with memory that a training step frees."""

from __future__ import annotations

import contextlib
import ctypes

__all__ = ["keep_memory"]

#: Parameters of mallopt, by malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Have the allocator keep what a step frees.

    It gives the end of the heap back to the system where that happens to be free, and the next step pays for getting it
    again: a tenth of a step and more, by accident. Where there is no glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_MMAP_THRESHOLD, 2**25)
