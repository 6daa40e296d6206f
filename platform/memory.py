"""Memory: whether there is enough, and returning what is freed."""

import ctypes
import sys

import psutil

from esper.platform.errors import UserError


def check_fits(needed: int, what: str) -> None:
    """Raise UserError where `what` needs more bytes than the machine's memory."""
    there = psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"{what} needs about {needed / 2**30:,.0f} GiB of memory and this machine has {there / 2**30:,.0f}: "
            "choose a smaller host, context or batch."
        )


def give_back() -> None:
    """Return freed memory to the system: glibc keeps 5 MiB per 512 decisions (measured); see malloc_trim(3)."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # musl has none
        ctypes.CDLL(None).malloc_trim(0)
