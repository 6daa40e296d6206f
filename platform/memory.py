"""Memory: whether there is enough, and what the C library keeps though nobody uses it."""

import ctypes
import sys

import psutil

from esper.platform.errors import UserError


def check_fits(needed: int, what: str) -> None:
    """Refuse what cannot be held by this machine, before it is tried.

    Args:
        needed: bytes.
        what: for which, as errors call it.

    Raises:
        UserError: the machine's whole memory is less.
    """
    there = psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"{what} needs about {needed / 2**30:,.0f} GiB of memory and this machine has {there / 2**30:,.0f}: "
            "choose a smaller host, context or batch."
        )


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc; else nothing.

    A driver frees thousands of arrays of a few KiB an iteration, between others that stay; glibc keeps such pages, some
    5 MiB for every 512 decisions (measured), until it is told to look
    (https://man7.org/linux/man-pages/man3/malloc_trim.3.html).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
