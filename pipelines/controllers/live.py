"""Progress of a controller's training: a live view in a terminal, else a line per iteration.

Only the view's thread writes to the terminal: what others say meanwhile is queued. Errors while drawing are shown in
the view's place and never end the training. The cursor stays visible.
"""

import io
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from esper.platform.console import Eta, duration, said_to, say

if TYPE_CHECKING:  # it imports Ray
    from esper.policies.simic.dispatcher import WorkerView

REFRESH_SECONDS = 0.25
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
    """A context manager around the iterations; `workers` returns a snapshot of the workers, from any thread."""

    def __init__(self, iterations: int, begin: int, workers: "Callable[[], list[WorkerView]]") -> None:
        self._iterations, self._begin, self._number, self._workers = iterations, begin, begin, workers
        self._eta, self._started, self._left = Eta(), time.monotonic(), "?"
        self._history: list[dict[str, float]] = []
        self._console = Console(file=sys.stderr, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._said: SimpleQueue[str] = SimpleQueue()
        self._stop, self._exit = threading.Event(), ExitStack()
        self._thread = threading.Thread(target=self._refresh, name="training-view", daemon=True)

    def iteration(self, number: int, metrics: dict[str, float]) -> None:
        """Record an iteration: its number, from 1, and `iteration_metrics`."""
        self._number, self._history = number, [*self._history, metrics]
        self._left = self._eta.left(self._done())
        if not self._console.is_interactive:
            told = ", ".join(f"{name} {value}" for name, value in _told(metrics).items())
            say(f"  iteration {number}/{self._iterations}: {told}, {self._left} left")

    def __enter__(self) -> Self:
        if self._console.is_interactive:  # a terminal that can be drawn on
            with suppress(OSError, ValueError):
                self._live.start()
                self._console.show_cursor(True)
            self._exit.enter_context(said_to(self._said.put))
            self._exit.enter_context(redirect_stderr(_Lines(self._said.put)))
            if sys.stdout.isatty():  # results that go elsewhere go there untouched
                self._exit.enter_context(redirect_stdout(_Lines(self._said.put)))
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._console.is_interactive:
            return
        self._stop.set()
        try:
            self._thread.join(timeout=2)  # it may wait for the workers' lock: then it is left to itself
            with suppress(OSError, ValueError):
                self._show(self.drawing(self._console, []))
                self._live.stop()
        finally:
            self._exit.close()
            with suppress(OSError, ValueError):
                while not self._said.empty():  # said meanwhile
                    say(self._said.get())

    def drawing(self, console: Console, workers: "list[WorkerView]") -> RenderableType:
        """The current view, at least a line shorter than the terminal."""
        head = Group(self._head(), *([_metrics(self._history)] if self._history else []))
        return Group(head, *_workers(workers, console.height - 1 - len(console.render_lines(head))))

    def _refresh(self) -> None:
        while not self._stop.is_set():
            try:
                drawing = self.drawing(self._console, self._workers())
            except Exception as error:
                drawing = Text(" ".join(f"live view: {type(error).__name__}: {error}".split()))
            with suppress(OSError, ValueError):
                if not self._stop.is_set():
                    self._show(drawing)
            self._stop.wait(REFRESH_SECONDS)

    def _show(self, drawing: RenderableType) -> None:
        """Print what was said above the view, and draw that."""
        with suppress(Empty):
            while True:
                self._console.print(Text(self._said.get_nowait()), soft_wrap=True)  # unbroken: it is copied whole
        self._live.update(drawing, refresh=True)

    def _done(self) -> float:
        return (self._number - self._begin) / max(1, self._iterations - self._begin)

    def _head(self) -> Text:
        elapsed = time.monotonic() - self._started
        decisions = sum(metrics.get("decisions", 0) for metrics in self._history)
        rate = f"{decisions / max(1e-9, elapsed):.3g} decisions/s" if decisions else "first episodes under way"
        told = f" {self._done():.0%}, {duration(elapsed)}, {self._left} left, {rate}"
        return Text(f"iteration {self._number}/{self._iterations}", "bold", no_wrap=True).append(told, "not bold")


class _Lines(io.TextIOBase):
    """A file whose lines are handed on."""

    def __init__(self, hand_on: Callable[[str], None]) -> None:
        self._hand_on, self._part = hand_on, ""

    def write(self, text: str) -> int:
        *whole, self._part = (self._part + text).split("\n")
        for line in whole:
            self._hand_on(line)
        return len(text)


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


def _workers(workers: "list[WorkerView]", room: int) -> list[RenderableType]:
    """A table of the first that fit into `room` lines, and a line that sums up all if some do not."""
    if not workers or room < 3:
        return []
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, form in COLUMNS.items():
        justify = "right" if form else "left"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=True, overflow="crop")
    shown = workers if len(workers) < room else workers[: room - 2]
    for one in shown:
        values = {name: getattr(one, name) for name in COLUMNS}
        cells = [Text("" if value in (None, -1) else f"{value:{COLUMNS[name]}}") for name, value in values.items()]
        table.add_row(*cells, style="dim" if one.state == "resting" else None)
    states = ", ".join(f"{count:,} {state}" for state, count in Counter(one.state for one in workers).items())
    rest = Text(f"and {len(workers) - len(shown):,} more; of all {len(workers):,}: {states}", "dim", no_wrap=True)
    return [table] if len(shown) == len(workers) else [table, rest]


def sparkline(values: list[float]) -> str:
    """A character per latest value, scaled from the least to the greatest; `!` where one is not finite."""
    values = values[-COURSE:]
    finite = [value for value in values if abs(value) < float("inf")]  # leaves out NaN too
    low, spread = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    scaled = [(value - low) / spread * len(BLOCKS) if spread else 0.0 for value in values]
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(x))] if abs(x) < float("inf") else "!" for x in scaled)
