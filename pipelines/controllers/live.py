"""A training of a controller as it goes: a live view in a terminal, else a plain line per iteration.

    esper ppo …            # in a terminal: the view, four times a second, messages above it
    esper ppo … 2> log     # plain lines; so too with TERM=dumb or unset

The view must never cost a training anything: what fails while it is drawn is shown in its place, and a terminal that
cannot be written to is left alone. It is drawn by a thread of its own, which asks for the workers *before* it takes the
terminal's lock, since whoever says something while he holds the dispatcher's lock waits for the terminal's. The cursor
stays visible, so that a killed process leaves a sane terminal.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from esper.pipelines.controllers.live_panel import Progress, panel
from esper.platform.console import Eta, said_to, say
from esper.policies.simic.view import WorkerView

REFRESH_SECONDS = 0.25
RATE_OVER = 5  # iterations over which decisions per second are averaged


class TrainingView:
    """Use it as a context manager around the iterations.

    Args:
        iterations: at which the training ends.
        begin: iterations done before, in a resumed training.
        workers: a snapshot of the workers, from any thread; an empty list where there are none to show.
    """

    def __init__(self, iterations: int, begin: int, workers: Callable[[], list[WorkerView]]) -> None:
        self._iterations, self._begin, self._workers = iterations, begin, workers
        self._eta = Eta()
        self._started = time.monotonic()
        self._ends: list[float] = []  # when each iteration ended
        self._history: list[dict[str, float]] = []
        self._number = begin
        self._seen: list[WorkerView] | str = []  # a text says why there is none
        self._over = False
        self._live: Live | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="training-view", daemon=True)
        self._exit = ExitStack()

    def iteration(self, number: int, metrics: dict[str, float]) -> None:
        """To be called after each iteration with its number, from 1, and `iteration_metrics`."""
        self._ends.append(time.monotonic())
        self._history.append(metrics)
        self._number = number
        left = self._eta.left(self._done())
        if self._live is None:
            say(f"  {plain_line(number, self._iterations, metrics)}, {left} left")

    def __enter__(self) -> Self:
        self._eta, self._started = Eta(), time.monotonic()
        if not is_live():
            return self
        console = _Console()
        live = Live(
            get_renderable=self.drawing,
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # results that go elsewhere go there untouched
            vertical_overflow="crop",
        )
        try:
            with console:  # always before rich's own lock
                live.start(refresh=True)
                console.show_cursor(True)
        except Exception as error:
            with suppress(Exception):
                live.stop()
            say(f"no live view ({_one_line(error)}): plain lines instead")
            return self
        self._live = live
        self._exit.enter_context(said_to(self._say))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the head as it stood, without the workers, and the terminal as it was."""
        if self._live is None:
            return
        self._over = True
        self._stop.set()
        try:
            self._thread.join(timeout=2)  # it may wait for the workers' lock: then it is left to itself
            with suppress(Exception), self._live.console:
                self._live.stop()
        finally:
            self._exit.close()

    def drawing(self) -> "_Guarded":
        """The view as it stands, for rich to print."""
        return _Guarded(self._panel)

    # -- The thread's side ---------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        assert self._live is not None
        while not self._stop.is_set():
            self._look()
            with suppress(OSError, ValueError), self._live.console:  # a terminal that is gone is no reason to complain
                self._live.refresh()
            self._stop.wait(REFRESH_SECONDS)

    def _look(self) -> None:
        try:
            self._seen = list(self._workers())
        except Exception as error:
            self._seen = f"workers cannot be seen: {_one_line(error)}"

    def _panel(self, width: int, height: int, ascii_only: bool) -> list[Text]:
        now = time.monotonic()
        progress = Progress(
            number=self._number,
            iterations=self._iterations,
            fraction=self._done(),
            elapsed=now - self._started,
            left=self._left(now),
            rate=self._rate(),
            over=self._over,
        )
        return panel(progress, list(self._history), self._seen, width, height, ascii_only=ascii_only)

    def _say(self, message: str) -> None:
        assert self._live is not None
        try:
            self._live.console.print(Text(message), soft_wrap=True)  # unbroken: it is copied whole
        except Exception:
            with suppress(OSError, ValueError):  # the terminal is gone
                print(message, file=sys.__stderr__, flush=True)

    # -- Numbers -------------------------------------------------------------------------------------------------

    def _done(self) -> float:
        """Fraction of the iterations to do, of which a resumed training has fewer."""
        return (self._number - self._begin) / max(1, self._iterations - self._begin)

    def _left(self, now: float) -> float | None:
        """Seconds left, counting down between iterations; none before the first ends."""
        done = self._done()
        if not self._ends or done <= 0:
            return None
        spent = self._ends[-1] - self._started
        return max(0.0, spent * (1 - done) / done - (now - self._ends[-1]))

    def _rate(self) -> float | None:
        """Decisions learned from per second, over the last iterations."""
        if not self._ends:
            return None
        starts = [self._started, *self._ends]
        last = min(RATE_OVER, len(self._ends))
        decisions = sum(metrics.get("decisions", 0.0) for metrics in self._history[-last:])
        return decisions / max(1e-9, starts[-1] - starts[-1 - last])


def is_live() -> bool:
    """Whether standard error is a terminal that can be drawn on."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
    except (AttributeError, ValueError):  # none at all, or closed
        return False


def plain_line(number: int, iterations: int, metrics: dict[str, float]) -> str:
    """An iteration in one line."""
    busy = f", workers busy {metrics['busy']:.0%}" if "busy" in metrics else ""  # surrogates have no clock of their own
    return (
        f"iteration {number}/{iterations}: return {metrics['return_mean']:+.3f}, "
        f"{metrics['episodes']:.0f} episodes, wait {metrics['wait']:.0%}, entropy {metrics['entropy']:.2f}, "
        f"explained variance {metrics['explained_variance']:+.2f}{busy}"
    )


class _Console(Console):
    """Writes one thing at a time: rich erases its last drawing before the next, by a height that must still be true."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)
        self._writing = threading.RLock()

    def __enter__(self) -> Self:
        self._writing.acquire()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, traceback)  # writes what is buffered
        finally:
            self._writing.release()


class _Guarded:
    """Lines drawn to fit the terminal as it is now, or why they cannot be."""

    def __init__(self, draw: Callable[[int, int, bool], list[Text]]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: object):
        width, height = console.size
        try:
            lines = self._draw(width, height, console.options.ascii_only)
        except Exception as error:
            lines = [Text(f"live view: {_one_line(error)}")]
        for line in lines[: max(1, height - 1)]:
            line.rstrip()
            line.truncate(width - 1, overflow="crop")  # a full line would wrap in some terminals
            yield line


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
