"""The picture of a controller's training: a small panel per question, over the iterations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from esper.policies.simic.health import KINDS, KL_TARGET, LOSSES

COLUMNS = 4
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Panel:
    """A title with what can be read there, the unit, and a line for each of `lines` that was logged.

    Attributes:
        draw: draws something else than lines.
        zero: the axis starts at 0.
        mark: a level to compare with.
        log: the axis is logarithmic.
    """

    title: str
    unit: str
    lines: dict[str, str]  # metric → its name in the legend; `=` for the metric's own, `""` for none
    draw: "Callable[[Axes, list[float], Rows], None] | None" = None
    zero: bool = False
    mark: float | None = None
    log: bool = False


def _returns(axes: Axes, x: list[float], rows: Rows) -> None:
    spread = any("return_min" in row and "return_max" in row for row in rows)
    axes.plot(x, _values(rows, "return_mean"), linewidth=1.4, label="mean" if spread else None)
    if spread:
        low, high = _values(rows, "return_min"), _values(rows, "return_max")
        axes.fill_between(x, low, high, alpha=0.2, linewidth=0, label="least to greatest")


def _shares(axes: Axes, x: list[float], rows: Rows) -> None:
    """Stacked; kinds that were never chosen are left out."""
    shown = [kind for kind in KINDS if any(row.get(kind, 0) > 0 for row in rows)]
    if not shown:
        return
    axes.stackplot(x, *([row.get(kind, 0.0) for row in rows] for kind in shown), labels=shown, linewidth=0, alpha=0.85)
    axes.set_ylim(0, 1)
    axes.margins(x=0)


PANELS = (
    Panel("return of an episode", "nats", {"return_mean": ""}, draw=_returns),
    Panel("final validation loss", "nats per token", {"val_loss": ""}),
    Panel("explained variance of the value", "fraction", {"explained_variance": ""}, mark=0.0),
    Panel("entropy of the policy", "nats", {"entropy": ""}, zero=True),
    Panel("what is chosen", "share of the decisions", dict.fromkeys(KINDS, ""), draw=_shares),
    Panel("KL of an update (dotted: target)", "nats", {"kl": ""}, zero=True, mark=KL_TARGET),
    Panel("clipped decisions", "fraction", {"clip_fraction": ""}, zero=True),
    Panel("policy's loss", "no unit", {"policy_loss": ""}, mark=0.0),
    Panel("value's loss", "squared, in units of its spread", {"value_loss": ""}, log=True),
    Panel("length of an episode", "decisions", {"episode_length": ""}, zero=True),
    Panel(
        "duration of an episode", "seconds", {"episode_seconds": "mean", "episode_seconds_max": "longest"}, zero=True
    ),
    Panel(
        "duration of an iteration", "seconds", {"sample_seconds": "sampling", "learn_seconds": "learning"}, zero=True
    ),
    Panel("policy lag", "updates", {"lag_mean": "mean", "lag_max": "greatest"}, zero=True),
    Panel("workers' time", "fraction", {"busy": "with an order", "waiting": "waiting"}, zero=True),
    Panel("lost since the start", "count", dict.fromkeys(LOSSES, "="), zero=True),
)


def training_picture(history: Rows, path: Path) -> None:
    """Write the picture as PNG; what was never logged, and losses where there were none, have no panel.

    Args:
        history: metrics of each iteration (`iteration_metrics`), with its number as `iteration` or from 1 on; an empty
            one draws nothing.
        path: of the PNG.
    """
    panels = [panel for panel in PANELS if any(_told(history, name) for name in panel.lines)]
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    width, height = 3.6 * columns, 2.5 * lines  # inches
    figure, grid = plt.subplots(lines, columns, figsize=(width, height), squeeze=False, sharex=True)
    figure.subplots_adjust(  # matplotlib's own layouts take as long as all the drawing
        left=0.65 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.3, hspace=0.3
    )
    x = [row.get("iteration", number) for number, row in enumerate(history, start=1)]
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, x, history)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
        axes.set_xlabel("iteration")
        axes.tick_params(labelbottom=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axes: Axes, panel: Panel, x: list[float], rows: Rows) -> None:
    if panel.draw is not None:
        panel.draw(axes, x, rows)
    else:
        for name, label in panel.lines.items():
            if _told(rows, name):
                values = _values(rows, name)
                marker = "." if len(x) < 3 else ""
                axes.plot(x, values, linewidth=1.4, label=name if label == "=" else label or None, marker=marker)
    if panel.mark is not None:
        axes.axhline(panel.mark, color="grey", linewidth=0.8, linestyle=":")
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, framealpha=0.7)


def _values(rows: Rows, name: str) -> list[float]:
    """A gap where an iteration has no value, or none that is finite."""
    values = [row.get(name, math.nan) for row in rows]
    return [value if math.isfinite(value) else math.nan for value in values]


def _told(rows: Rows, name: str) -> bool:
    """Whether a metric was logged and, if it counts losses, there were any."""
    values = [row[name] for row in rows if name in row]
    return any(values) if name in LOSSES else bool(values)
