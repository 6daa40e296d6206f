"""Draws a controller's training: a panel per question, over the iterations."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from esper.policies.simic.health import KINDS, KL_TARGET, LOSSES

COLUMNS = 4
Rows = list[dict[str, float]]


class Panel(NamedTuple):
    """`lines`: metric → its legend, None for a single one."""

    title: str
    unit: str
    lines: dict[str, str | None]
    zero: bool = False  # the axis starts at 0
    mark: float | None = None  # a level to compare with


PANELS = (
    Panel("return of an episode", "nats", {"return_mean": "mean", "return_min": "least", "return_max": "greatest"}),
    Panel("final validation loss", "nats per token", {"val_loss": "of the episodes", "heldout_loss": "held-out"}),
    Panel("explained variance of the value", "fraction", {"explained_variance": None}, mark=0.0),
    Panel("entropy of the policy", "nats", {"entropy": None}, zero=True),
    Panel("what is chosen", "share of the decisions", {kind: kind for kind in KINDS}, zero=True),
    Panel("KL of an update (dotted: target)", "nats", {"kl": None}, zero=True, mark=KL_TARGET),
    Panel("clipped decisions", "fraction", {"clip_fraction": None}, zero=True),
    Panel("policy's loss", "no unit", {"policy_loss": None}, mark=0.0),
    Panel("value's loss", "squared, in units of its spread", {"value_loss": None}, zero=True),
    Panel("length of an episode", "decisions", {"episode_length": None}, zero=True),
    Panel("duration of an episode", "seconds", {"episode_seconds": "mean", "episode_seconds_max": "longest"}, True),
    Panel("duration of an iteration", "seconds", {"sample_seconds": "sampling", "learn_seconds": "learning"}, True),
    Panel("policy lag", "updates", {"lag_mean": "mean", "lag_max": "greatest"}, zero=True),
    Panel("workers' time", "fraction", {"busy": "with an order", "waiting": "waiting"}, zero=True),
    Panel("lost since the start", "count", {name: name for name in LOSSES}, zero=True),
)


def training_picture(history: Rows, path: Path) -> None:
    """Write `iteration_metrics` with `iteration` as PNG, without empty panels; nothing where nothing was logged."""
    told = {name for panel in PANELS for name in panel.lines if _told(history, name)}
    panels = [panel for panel in PANELS if told & panel.lines.keys()]
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    width, height = 3.6 * columns, 2.5 * lines  # inches
    figure, grid = plt.subplots(lines, columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(  # matplotlib's own layouts take as long as all the drawing
        left=0.65 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.3, hspace=0.4
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, {name: label for name, label in panel.lines.items() if name in told}, history)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axes: Any, panel: Panel, lines: dict[str, str | None], history: Rows) -> None:
    x = [row["iteration"] for row in history]
    for name, label in lines.items():
        values = [row.get(name, math.nan) for row in history]
        finite = [value if math.isfinite(value) else math.nan for value in values]  # a gap
        axes.plot(x, finite, linewidth=1.4, label=label, marker="." if len(x) < 3 else "")
    if panel.mark is not None:
        axes.axhline(panel.mark, color="grey", linewidth=0.8, linestyle=":")
    if panel.zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.set_xlabel("iteration", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(alpha=0.3)
    if any(lines.values()):
        axes.legend(fontsize=7, framealpha=0.7)


def _told(history: Rows, name: str) -> bool:
    """Whether a metric was logged; counts and shares also have to be above 0 once."""
    values = [row[name] for row in history if name in row]
    return any(values) if name in (*LOSSES, *KINDS) else bool(values)
