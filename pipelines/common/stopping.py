"""Ctrl-C and SIGTERM as a request: the work stops where it can be taken up again, not in the middle of something."""

import signal
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Someone asked the work to stop; `exit_code` is 128 plus the signal's number, as in shells."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


class StopSignals:
    """Within its `with` block a first signal is noted for `check` to raise; a second one acts at once."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, object] = {}

    def check(self) -> None:
        """Call where stopping is possible; raises Stopped once a signal has come."""
        if self._asked is not None:
            raise Stopped(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            raise Stopped(number, "stopped at once; what was saved last is kept.")
        self._asked = number

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
