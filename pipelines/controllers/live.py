"""Progress of a controller's training: a live view in a terminal, else a line per iteration.

Errors while drawing are shown in the view's place and never end the training. The cursor stays visible.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from esper.platform.console import Eta, duration, said_to, say

if TYPE_CHECKING:  # it imports Ray
    from esper.policies.simic.worker_table import WorkerView

REFRESH_SECONDS = 0.25
COURSE = 16  # iterations that a sparkline shows
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"
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
STYLES = {"starting": "yellow", "resting": "dim"}


class TrainingView:
    """A context manager around the iterations; `workers` returns a snapshot of the workers, from any thread."""

    def __init__(self, iterations: int, begin: int, workers: "Callable[[], list[WorkerView]]") -> None:
        self._iterations, self._begin, self._number, self._workers = iterations, begin, begin, workers
        self._eta, self._started, self._left = Eta(), time.monotonic(), "?"
        self._history: list[dict[str, float]] = []
        self._live: Live | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="training-view", daemon=True)
        self._exit = ExitStack()

    def iteration(self, number: int, metrics: dict[str, float]) -> None:
        """Record an iteration: its number, from 1, and `iteration_metrics`."""
        self._number, self._history = number, [*self._history, metrics]
        self._left = self._eta.left(self._done())
        if self._live is None:
            say(f"  {plain_line(number, self._iterations, metrics)}, {self._left} left")

    def __enter__(self) -> Self:
        if is_live():
            results_too = sys.stdout.isatty()  # results that go elsewhere go there untouched
            console = _Console()
            self._live = Live(
                console=console, auto_refresh=False, redirect_stdout=results_too, vertical_overflow="crop"
            )
            with suppress(OSError, ValueError), console:
                self._live.start()
                console.show_cursor(True)
            self._exit.enter_context(said_to(self._say))
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is None:
            return
        self._stop.set()
        try:
            self._thread.join(timeout=2)  # it may wait for the workers' lock: then it is left to itself
            with suppress(OSError, ValueError), self._live.console:
                self._live.update(self.drawing([]))
                self._live.stop()
        finally:
            self._exit.close()

    def drawing(self, workers: "list[WorkerView]") -> RenderableType:
        """The current view, at least a line shorter than the terminal."""
        assert self._live is not None
        console = self._live.console
        head = Group(self._head(), *_metrics(self._history, console.options.ascii_only))
        return Group(head, *_workers(workers, console.height - 1 - len(console.render_lines(head))))

    def _refresh(self) -> None:
        assert self._live is not None
        while not self._stop.is_set():
            try:  # the workers' lock before the terminal's: who holds theirs may be about to say something
                drawing = self.drawing(self._workers())
            except Exception as error:
                drawing = Text(" ".join(f"live view: {type(error).__name__}: {error}".split()))
            with suppress(OSError, ValueError), self._live.console:
                self._live.update(drawing, refresh=True)
            self._stop.wait(REFRESH_SECONDS)

    def _say(self, message: str) -> None:
        assert self._live is not None
        with suppress(OSError, ValueError), self._live.console:  # locked first: `print` takes a copy of rich's hooks
            self._live.console.print(Text(message), soft_wrap=True)  # unbroken: it is copied whole

    def _done(self) -> float:
        return (self._number - self._begin) / max(1, self._iterations - self._begin)

    def _head(self) -> Text:
        elapsed = time.monotonic() - self._started
        decisions = sum(metrics.get("decisions", 0) for metrics in self._history)
        rate = f"{decisions / max(1e-9, elapsed):.3g} decisions/s" if decisions else "first episodes under way"
        told = f" {self._done():.0%}, {duration(elapsed)}, {self._left} left, {rate}"
        return Text(f"iteration {self._number}/{self._iterations}", "bold", no_wrap=True).append(told, "not bold")


def _metrics(history: list[dict[str, float]], ascii_only: bool) -> list[Table]:
    if not history:
        return []
    grid, now = Table.grid(padding=(0, 2)), history[-1]
    told = {key: form for key, form in SHOWN.items() if key in now} | {key: ".0f" for key in LOST if now.get(key)}
    for key, form in told.items():
        course = sparkline([metrics[key] for metrics in history if key in metrics], ascii_only)
        grid.add_row(Text(key.replace("_", " "), "dim"), f"{now[key]:{form}}", Text(course, "cyan"))
    return [grid]


def _workers(workers: "list[WorkerView]", room: int) -> list[RenderableType]:
    """A table of the first that fit into `room` lines, and a line that sums up all if some do not."""
    if not workers or room < 3:
        return []
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "state", "episode", "decision", "budget", "loss", "params", "s/decision"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    table.add_column(Text("last action", no_wrap=True), overflow="crop")  # gives way first
    shown = workers if len(workers) < room else workers[: room - 2]
    for one in shown:
        number = one.worker if one.worker >= 0 else None
        values = (number, one.state, one.episode, one.decision, one.budget_used, one.loss, one.parameters, one.seconds)
        forms = ("d", "", "d", "d", ".0%", ".4f", ",d", ".3g")
        cells = ["" if value is None else f"{value:{form}}" for value, form in zip(values, forms, strict=True)]
        action = Text((one.action or "").replace("\n", " "), no_wrap=True)
        table.add_row(*cells, action, style=STYLES.get(one.state))
    states = ", ".join(f"{count:,} {state}" for state, count in Counter(one.state for one in workers).items())
    rest = Text(f"and {len(workers) - len(shown):,} more; of all {len(workers):,}: {states}", "dim", no_wrap=True)
    return [table] if len(shown) == len(workers) else [table, rest]


def sparkline(values: list[float], ascii_only: bool = False) -> str:
    """A character per latest value, scaled from the least to the greatest; `!` where one is not finite."""
    values, blocks = values[-COURSE:], ASCII_BLOCKS if ascii_only else BLOCKS
    finite = [value for value in values if abs(value) < float("inf")]  # leaves out NaN too
    low, spread = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    scaled = [(value - low) / spread * len(blocks) if spread else 0.0 for value in values]
    return "".join(blocks[min(len(blocks) - 1, int(x))] if abs(x) < float("inf") else "!" for x in scaled)


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
    """Locked: rich erases the last drawing by its height, which another thread must not change meanwhile."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)
        self._writing = threading.RLock()  # always taken before rich's own

    def __enter__(self) -> Self:
        self._writing.acquire()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)  # writes what is buffered
        finally:
            self._writing.release()
