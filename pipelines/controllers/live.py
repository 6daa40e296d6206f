"""Progress of a controller's training: a live view in a terminal, else a line per iteration.

What is said meanwhile stands above the view. Neither an error while drawing, which is shown in the view's place, nor a
terminal that has gone ends the training. The cursor stays visible.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from esper.platform.console import Eta, duration, said_to, say

COURSE, BLOCKS = 16, "▁▂▃▄▅▆▇█"  # iterations that a sparkline shows, and with what
SHOWN = {  # metric → format
    "return_mean": "+.3f",
    "explained_variance": "+.2f",
    "entropy": ".2f",
    "kl": ".4f",
    "wait": ".0%",
    "clip_fraction": ".0%",
    "episodes": ".0f",
    "busy": ".0%",
    "lag_mean": ".1f",
}
LOST = ("failures", "refused", "dropped")  # counts that are shown where they are not 0
COLUMNS = {"worker": "d", "state": "", "episode": "d", "decision": "d", "budget_used": ".0%", "loss": ".4f"}
COLUMNS |= {"parameters": ",d", "seconds": ".3g", "action": ""}  # a worker's field → format


class TrainingView:
    """A context manager around the iterations; `workers` says what each does, from any thread and without a lock."""

    def __init__(self, iterations: int, begin: int, workers: Callable[[], list[dict[str, Any]]]) -> None:
        self._iterations, self._begin, self._number, self._workers = iterations, begin, begin, workers
        self._eta, self._started, self._left = Eta(), time.monotonic(), "?"
        self._history: list[dict[str, float]] = []
        self._written = ""
        terminal: Any = _Terminal()
        self._console = _Console(file=terminal, highlight=False)
        results = sys.stdout.isatty()  # elsewhere they go untouched
        self._live = Live(console=self._console, get_renderable=self.drawing, redirect_stdout=results)
        self._console.whole = self._live._lock
        self._exit = ExitStack()

    def iteration(self, number: int, metrics: dict[str, float], texts: Mapping[int, str | None] = {}) -> None:
        """An iteration has ended; `texts`: what the networks of its episodes have written, by their numbers."""
        for episode, text in texts.items():
            self._written = f"episode {episode} writes: {text}" if text else self._written
        self._number, self._history = number, [*self._history, metrics]
        self._left = self._eta.left(self._done())
        if not self._console.is_interactive:
            told = ", ".join(f"{name} {value}" for name, value in _told(metrics).items())
            say(f"  iteration {number}/{self._iterations}: {told}, {self._left} left")

    def __enter__(self) -> Self:
        if self._console.is_interactive:  # a terminal that can be drawn on
            self._exit.enter_context(self._live)
            # Unbroken: it is copied whole.
            self._exit.enter_context(said_to(lambda message: self._console.print(Text(message), soft_wrap=True)))
            self._console.show_cursor(True)
        return self

    def __exit__(self, *error: object) -> None:
        self._workers = list  # the picture that stays is without them
        self._exit.close()
        if self._written and not self._console.is_interactive:
            say(self._written)

    def drawing(self) -> RenderableType:
        """The current view, or what is wrong with it; rich crops it to the terminal."""
        try:
            metrics = [_metrics(self._history)] if self._history else []
            written = [Text(self._written, "italic")] if self._written else []
            return Group(self._head(), *metrics, *written, *_workers(self._workers(), self._console.height))
        except Exception as error:
            return Text(" ".join(f"live view: {type(error).__name__}: {error}".split()))

    def _done(self) -> float:
        return (self._number - self._begin) / max(1, self._iterations - self._begin)

    def _head(self) -> Text:
        elapsed = time.monotonic() - self._started
        decisions = sum(metrics.get("decisions", 0) for metrics in self._history)
        rate = f"{decisions / max(1e-9, elapsed):.3g} decisions/s" if decisions else "first episodes under way"
        told = f" {self._done():.0%}, {duration(elapsed)}, {self._left} left, {rate}"
        return _line(f"iteration {self._number}/{self._iterations}", "bold").append(told, "not bold")


class _Console(Console):
    """Writes what a thread prints before another begins: rich goes back over its last drawing, which must be there."""

    whole: AbstractContextManager[Any] = nullcontext()

    def print(self, *objects: Any, **how: Any) -> None:
        with self.whole:
            super().print(*objects, **how)


class _Terminal:
    """Standard error as it is now, for rich: once it has gone, what is written to it is lost."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="crop")


def _told(metrics: dict[str, float]) -> dict[str, str]:
    forms = SHOWN | {key: ".0f" for key in LOST if metrics.get(key)}
    return {key.replace("_", " "): f"{metrics[key]:{form}}" for key, form in forms.items() if key in metrics}


def _metrics(history: list[dict[str, float]]) -> Table:
    """The latest iteration's, each with its course."""
    grid = Table.grid(padding=(0, 2))
    for name, value in _told(history[-1]).items():
        course = sparkline([metrics.get(name.replace(" ", "_"), float("nan")) for metrics in history])
        grid.add_row(Text(name, "dim"), value, Text(course, "cyan"))
    return grid


def _workers(workers: list[dict[str, Any]], most: int) -> list[RenderableType]:
    """A line that sums up all, and a table of the first."""
    states = ", ".join(f"{count:,} {state}" for state, count in Counter(one["state"] for one in workers).items())
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, form in COLUMNS.items():
        justify = "right" if form else "left"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=True, overflow="crop")
    for one in workers[:most]:
        cells = ["" if one.get(name) is None else f"{one[name]:{form}}" for name, form in COLUMNS.items()]
        table.add_row(*map(Text, cells))
    return [_line(f"workers: {states}", "dim"), table] if workers else []


def sparkline(values: list[float]) -> str:
    """A character per latest value, scaled from the least to the greatest; `!` where one is not finite."""
    values = values[-COURSE:]
    finite = [value for value in values if abs(value) < float("inf")]  # leaves out NaN too
    low, spread = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    scaled = [(value - low) / spread * len(BLOCKS) if spread else 0.0 for value in values]
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(x))] if abs(x) < float("inf") else "!" for x in scaled)
