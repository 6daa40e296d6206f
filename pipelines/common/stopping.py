"""Ctrl-C and SIGTERM as a request: the work stops where it can be taken up again, not in the middle of something."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Someone asked the work to stop; `exit_code` is 128 plus the signal's number, as in shells."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def stop_signals(how: str) -> Iterator[Callable[[], None]]:
    """Yield `check`, which raises Stopped after a signal and says `how` to go on; a second signal acts at once."""
    asked: list[int] = []

    def check() -> None:
        if asked:
            raise Stopped(asked[0], how)

    def note(number: int, frame: FrameType | None) -> None:
        check()
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
