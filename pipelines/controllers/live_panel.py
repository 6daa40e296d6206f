"""What the live view shows, as lines that fit a given width and height: pure, knows nothing of terminals or threads.

A head (where the training stands, and its metrics with their latest course), then a line per worker: the first that
fit, and one that sums up all where some do not. A narrow terminal loses columns, the least telling first.
"""

from collections import Counter
from dataclasses import dataclass, replace

from rich.text import Text

from esper.platform.console import duration
from esper.policies.simic.view import STATES, WorkerView

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=*#"
COURSE = 16  # iterations that a sparkline shows
BAR = 10
STATE_STYLES = {"starting": "yellow", "training": "", "resting": "dim"}


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        number: iterations that have ended, with those before a resume.
        iterations: at which it ends.
        fraction: done of what there was to do, from 0 to 1.
        elapsed: seconds.
        left: seconds; none while unknown.
        rate: decisions learned from per second; none while unknown.
        over: the training has ended, or was stopped.
    """

    number: int
    iterations: int
    fraction: float
    elapsed: float
    left: float | None
    rate: float | None
    over: bool = False


@dataclass(frozen=True)
class Shown:
    """A metric in the head: its key, its name, its format, and a fixed range of its sparkline where it has one."""

    key: str
    name: str
    form: str
    low: float | None = None
    high: float | None = None


SHOWN = (
    Shown("return_mean", "return", "+.3f"),
    Shown("explained_variance", "explained variance", "+.2f", -1.0, 1.0),
    Shown("entropy", "entropy", ".2f", 0.0),
    Shown("kl", "KL", ".4f", 0.0),
    Shown("wait", "waits", ".0%", 0.0, 1.0),
    Shown("clip_fraction", "clip fraction", ".0%", 0.0, 1.0),
)


def panel(
    progress: Progress,
    history: list[dict[str, float]],
    workers: list[WorkerView] | str,
    width: int,
    height: int,
    *,
    ascii_only: bool = False,
) -> list[Text]:
    """The view, at most `height` − 1 lines of at most `width` − 1 columns where there is room for the head.

    Args:
        progress: where the training stands.
        history: metrics of each iteration so far.
        workers: a snapshot of them, or why there is none.
        width: of the terminal, in columns.
        height: of the terminal, in lines.
        ascii_only: the terminal's encoding has no block characters.
    """
    lines = [head(progress, width, ascii_only), *metrics_lines(history, width, ascii_only)]
    if progress.over:
        return lines
    if isinstance(workers, str):
        return [*lines, Text(workers, style="yellow")]
    return [*lines, *worker_lines(workers, width, height - 1 - len(lines), ascii_only)]


def head(progress: Progress, width: int, ascii_only: bool) -> Text:
    """`iteration 7/20 ██████░░░░ 1m12s, 2m05s left, 12.3 decisions/s`."""
    line = Text(f"iteration {progress.number}/{progress.iterations}", style="bold")
    if width >= 60:
        line.append(f" {bar(progress.fraction, ascii_only)}", style="not bold cyan")
    rest = [duration(progress.elapsed)]
    if progress.left is not None and not progress.over:
        rest.append(f"{duration(progress.left)} left")
    if progress.rate is not None:
        rest.append(f"{progress.rate:.3g} decisions/s")
    if progress.number == 0 and not progress.over:
        rest.append("first episodes under way")
    return line.append(f" {', '.join(rest)}", style="not bold")


def metrics_lines(history: list[dict[str, float]], width: int, ascii_only: bool) -> list[Text]:
    """Metrics with their course, two to a line where there is room, and a line of counts."""
    if not history:
        return []
    now = history[-1]
    course = min(COURSE, max(0, (width - 58) // 2)) if width >= 80 else min(COURSE, max(0, width - 30))
    cells = []
    for shown in SHOWN:
        values = [metrics[shown.key] for metrics in history if shown.key in metrics]
        if shown.key in now:
            cell = Text(f"{shown.name:18} ", style="dim")
            cell.append(f"{now[shown.key]:{shown.form}}".rjust(8), style="not dim")
            spark = sparkline(values[-course:] if course else [], shown.low, shown.high, ascii_only)
            cells.append(cell.append(f" {spark:{course}}", style="not dim cyan"))
    two = width >= 80
    lines = [Text(GAP).join(cells[i : i + 1 + two]) for i in range(0, len(cells), 1 + two)]
    counts = [f"{now['episodes']:.0f} episodes"] if "episodes" in now else []
    if "busy" in now:
        counts.append(f"workers busy {now['busy']:.0%}")
    if "lag_mean" in now:
        counts.append(f"policy lag {now['lag_mean']:.1f}")
    counts += [f"{name} {now[name]:.0f}" for name in ("failures", "refused", "dropped") if now.get(name)]
    return [*lines, Text(", ".join(counts), style="dim")]


@dataclass(frozen=True)
class Column:
    """A column of the workers' table: its heading, its width, whether it is flush right, the least terminal with it."""

    heading: str
    width: int
    right: bool = True
    least: int = 0


GAP = "  "
COLUMNS = (
    Column("worker", 6),
    Column("state", 8, right=False),
    Column("episode", 7, least=110),
    Column("decision", 8, least=110),
    Column("budget", 6),
    Column("", BAR, right=False, least=100),
    Column("loss", 7),
    Column("params", 6, least=50),
    Column("s/decision", 10, least=60),
)
ACTION = Column("last action", 12, right=False)  # takes what is left of the line


def worker_lines(workers: list[WorkerView], width: int, room: int, ascii_only: bool) -> list[Text]:
    """The table in at most `room` lines; nothing where not even its heading and two lines fit."""
    if not workers or room < 3:
        return []
    columns = [column for column in COLUMNS if width >= column.least]
    left = width - 1 - sum(column.width + len(GAP) for column in columns)
    if left >= ACTION.width:
        columns.append(replace(ACTION, width=left))
    lines = [Text(GAP.join(_fit(column.heading, column) for column in columns), style="dim")]
    fit = len(workers) if len(workers) <= room - 1 else room - 2
    lines += [_worker_line(worker, columns, ascii_only) for worker in workers[:fit]]
    if fit < len(workers):
        states = Counter(worker.state for worker in workers)
        told = ", ".join(f"{states[state]:,} {state}" for state in STATES if states[state])
        lines.append(Text(f"and {len(workers) - fit:,} more; of all {len(workers):,}: {told}", style="dim"))
    return lines


def sparkline(values: list[float], low: float | None, high: float | None, ascii_only: bool = False) -> str:
    """A character per value, from `low` to `high` or to the least and greatest of them; `!` for one not finite."""
    finite = [value for value in values if abs(value) < float("inf")]  # leaves out NaN too
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    low = min(finite, default=0.0) if low is None else low
    high = max(finite, default=0.0) if high is None else high
    step = (high - low) / len(blocks)

    def block(value: float) -> str:
        if not abs(value) < float("inf"):
            return "!"
        return blocks[min(len(blocks) - 1, max(0, int((value - low) / step)))] if step > 0 else blocks[0]

    return "".join(map(block, values))


def bar(fraction: float, ascii_only: bool = False) -> str:
    """A bar of `BAR` characters."""
    full = round(BAR * min(1.0, max(0.0, fraction)))
    return ("#" * full).ljust(BAR, ".") if ascii_only else ("█" * full).ljust(BAR, "░")


def count(number: int) -> str:
    """A count in at most six characters: `999`, `12.3k`, `4.56M`, `1.20G`."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            scaled = number / unit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{name}"
    return str(number)


def _worker_line(worker: WorkerView, columns: list[Column], ascii_only: bool) -> Text:
    used = worker.budget_used
    cells = {
        "worker": "" if worker.worker < 0 else str(worker.worker),
        "state": worker.state,
        "episode": _text(worker.episode, "d"),
        "decision": _text(worker.decision, "d"),
        "budget": _text(used, ".0%"),
        "": "" if used is None else bar(used, ascii_only),
        "loss": _text(worker.loss, ".4f"),
        "params": "" if worker.parameters is None else count(worker.parameters),
        "s/decision": "<0.01" if worker.seconds is not None and worker.seconds < 0.01 else _text(worker.seconds, ".3g"),
        "last action": worker.action or "",
    }
    line = Text(GAP.join(_fit(cells[column.heading], column) for column in columns))
    line.stylize(STATE_STYLES[worker.state])
    return line


def _fit(text: str, column: Column) -> str:
    """Exactly the column's width; text that is longer ends in `~`."""
    text = text.replace("\n", " ")
    if len(text) > column.width:
        text = text[: column.width - 1] + "~"
    return text.rjust(column.width) if column.right else text.ljust(column.width)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
