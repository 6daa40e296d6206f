"""Draws a controller's training: a panel per question, over the iterations."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from esper.policies.simic.health import KINDS, KL_TARGET, LOSSES

COLUMNS = 4


class Panel(NamedTuple):
    """`lines`: metric → its legend."""

    title: str
    unit: str
    lines: dict[str, str]
    zero: bool = True  # the axis starts at 0
    mark: float | None = None  # a level to compare with


STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 10,
    "legend.fontsize": 7,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
STYLE |= {"lines.linewidth": 1.4, "lines.marker": ".", "lines.markersize": 3}
PANELS = (
    Panel("return of an episode", "nats", {"return_mean": "mean", "return_min": "least", "return_max": "most"}, False),
    Panel("final validation loss", "nats", {"val_loss": "episodes", "held_out_loss": "held-out"}, False),
    Panel("explained variance of the value", "fraction", {"explained_variance": ""}, False, 0.0),
    Panel("entropy of the policy", "nats", {"entropy": ""}),
    Panel("what is chosen", "share of the decisions", {kind: kind for kind in KINDS}),
    Panel("KL of an update (dotted: target)", "nats", {"kl": ""}, mark=KL_TARGET),
    Panel("KL from the planner's clone", "nats", {"anchor_kl": ""}),
    Panel("clipped decisions", "fraction", {"clip_fraction": ""}),
    Panel("policy's loss", "no unit", {"policy_loss": ""}, False, 0.0),
    Panel("value's loss", "squared, in units of its spread", {"value_loss": ""}),
    Panel("length of an episode", "decisions", {"episode_length": ""}),
    Panel("duration of an episode", "seconds", {"episode_seconds": "mean", "episode_seconds_max": "longest"}),
    Panel("duration of an iteration", "seconds", {"sample_seconds": "sampling", "learn_seconds": "learning"}),
    Panel("policy lag", "updates", {"lag_mean": "mean", "lag_max": "greatest"}),
    Panel("workers' time", "fraction", {"busy": "with an order", "waiting": "waiting"}),
    Panel("lost since the start", "count", {name: name for name in LOSSES}),
)


def training_picture(history: list[dict[str, float]], path: Path) -> None:
    """Write `iteration_metrics` with `iteration` as PNG, without empty panels; nothing where nothing was logged."""
    known: Any = pd.DataFrame(history)
    rare = [name for name in (*LOSSES, *KINDS) if name in known and not known[name].any()]  # counts, shares: all 0
    known = known.drop(columns=rare).replace([np.inf, -np.inf], np.nan)
    panels = [panel for panel in PANELS if panel.lines.keys() & set(known)]
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    with plt.rc_context(STYLE):
        size = (3.6 * columns, 2.5 * lines)  # inches
        figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            for name in [name for name in panel.lines if name in known]:
                axes.plot(known["iteration"], known[name], label=panel.lines[name])
            if panel.mark is not None:
                axes.axhline(panel.mark, color="grey", linewidth=0.8, linestyle=":", marker="")
            axes.set(title=panel.title, ylabel=panel.unit, xlabel="iteration", ylim=(0, None) if panel.zero else None)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            if any(panel.lines.values()):
                axes.legend()
        figure.savefig(path, dpi=120)
        plt.close(figure)
