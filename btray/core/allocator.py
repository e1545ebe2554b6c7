"""The C library's memory, kept by processes that take and free the same large arrays over and over."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_KEPT = 512 << 20
_LARGEST = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep what it frees (up to 512 MiB at a time) instead of giving it back to the system.

    glibc maps large arrays anew each time and gives back what a thread frees; every page of the next image or layer
    then costs a fault, together up to a fifth of a forward pass. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
