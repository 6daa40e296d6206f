"""Draws a controller's training: a panel per question, over the iterations."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from esper.policies.simic.health import KINDS, KL_TARGET, LOSSES

COLUMNS = 4
STYLE: dict[Any, Any] = {"font.size": 8, "legend.fontsize": 7, "axes.grid": True, "grid.alpha": 0.3}
PANELS = {  # title and unit → metrics
    "return of an episode (nats)": ("return_mean", "return_min", "return_max"),
    "final validation loss (nats)": ("val_loss", "held_out_loss"),
    "explained variance of the value": ("explained_variance",),
    "entropy of the policy (nats)": ("entropy",),
    "what is chosen (share of decisions)": KINDS,
    f"KL of an update (nats; target {KL_TARGET})": ("kl",),
    "KL from the planner's clone (nats)": ("anchor_kl",),
    "clipped decisions (fraction)": ("clip_fraction",),
    "policy's loss": ("policy_loss",),
    "value's loss (in units of its spread²)": ("value_loss",),
    "length of an episode (decisions)": ("episode_length",),
    "duration of an episode (seconds)": ("episode_seconds", "episode_seconds_max"),
    "duration of an iteration (seconds)": ("sample_seconds", "learn_seconds"),
    "policy lag (updates)": ("lag_mean", "lag_max"),
    "workers' time (fraction)": ("busy", "waiting"),
    "lost since the start (count)": LOSSES,
}


def training_picture(history: list[dict[str, float]], path: Path) -> None:
    """Write `iteration_metrics` with `iteration` as PNG, without empty panels; nothing where nothing was logged."""
    known: Any = pd.DataFrame(history)
    known = known.drop(columns=[name for name in (*LOSSES, *KINDS) if name in known and not known[name].any()])
    known = known.replace([np.inf, -np.inf], np.nan)
    panels = {title: own for title, names in PANELS.items() if (own := [name for name in names if name in known])}
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        width, height = 3.6 * columns, 2.5 * lines  # inches
        figure, grid = plt.subplots(lines, columns, figsize=(width, height), squeeze=False)
        edges = {"left": 0.5 / width, "right": 1 - 0.1 / width, "bottom": 0.4 / height, "top": 1 - 0.3 / height}
        figure.subplots_adjust(**edges, wspace=0.17, hspace=0.4)  # constrained, it would be drawn twice: a second more
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, own) in zip(grid.flat, panels.items(), strict=False):
            known.plot("iteration", own, ax=axes, title=title, style=".-", legend=len(own) > 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        figure.savefig(path, dpi=120)
        plt.close(figure)
