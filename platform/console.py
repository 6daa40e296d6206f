"""What a person sees: plain lines on standard error, so that standard output stays for results."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

_listener: Callable[[str], None] | None = None


def say(message: str) -> None:
    """Print one line of progress or notice."""
    listener = _listener
    if listener is None:
        print(message, file=sys.stderr, flush=True)
    else:
        listener(message)


@contextmanager
def said_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Within the block, send what any thread says to `listener`, such as a live display."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def counted(number: float, noun: str) -> str:
    """A number with its noun: `1 seed`, `2 seeds`, `0.5 cores`."""
    return f"{number:,.15g} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: `1:02:05`."""
    return str(timedelta(seconds=max(0, round(seconds))))


class Eta:
    """Time left, from the time taken so far; `done` is the fraction finished before this started."""

    def __init__(self, done: float = 0.0) -> None:
        self._start, self._done = time.perf_counter(), done

    def left(self, fraction: float) -> str:
        """Time left at a finished `fraction` in [0, 1]; `?` before any progress."""
        if fraction <= self._done:
            return "?"
        return duration((time.perf_counter() - self._start) * (1 - fraction) / (fraction - self._done))
