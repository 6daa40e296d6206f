"""Memory that the C library keeps though nobody uses it."""

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc; else nothing.

    A driver frees thousands of arrays of a few KiB an iteration, between others that stay; glibc keeps such pages, some
    5 MiB for every 512 decisions (measured, `python benchmarks/run.py driver`), until it is told to look
    (https://man7.org/linux/man-pages/man3/malloc_trim.3.html).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
