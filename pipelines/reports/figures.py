"""The picture of a report: loss over the budget, final losses, and loss over all other costs.

A label has one colour everywhere: greys for static sizes; followers (`static_final:tamiyo`) are hollow and dotted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter

from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.budgets import OverBudgets
from esper.pipelines.reports.paired_tests import Trials, draw_envelope
from esper.pipelines.reports.runs import AXES

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),  # Okabe–Ito without black and yellow
    *("#332288", "#882255", "#999933", "#AA4499", "#117733", "#661100"),  # Tol's muted ones that are unlike these
)
COLUMNS = 3  # of panels
MARKERS = {"static_final": "s", "static_lrpath": "h", "random": "D"}  # of those that follow an arm
STYLE: dict[Any, Any] = {"axes.grid": True, "axes.axisbelow": True, "legend.frameon": False, "svg.hashsalt": "esper"}
Look = dict[str, Any]  # color, marker, linestyle and markerfacecolor, as matplotlib's `plot` takes them


def looks(arms: Mapping[str, str]) -> dict[str, Look]:
    """How each label (→ its arm) is drawn."""
    static = [label for label, arm in arms.items() if arm == "static"]
    leaders = {label: label.partition(":")[2] for label in arms if label.partition(":")[0] in MARKERS}
    others = dict.fromkeys(leaders.get(label) or label for label in arms if label not in static)
    colors = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(others)}
    colors |= {label: f"{grey:.3f}" for label, grey in zip(static, np.linspace(0.72, 0.35, len(static)), strict=True)}
    found: dict[str, Look] = {}
    for label in arms:
        follows = leaders.get(label, "")
        color, line = colors[follows or label], ":" if follows else "--" if label in static else "-"
        marker = MARKERS[label.partition(":")[0]] if follows else "o"
        found[label] = {"color": color, "marker": marker, "linestyle": line}
        found[label]["mfc"] = "white" if follows else color
    return found


def draw_losses(axes: Axes, trials: Trials, axis: str) -> None:
    """Loss against a cost: mid-run means, grafts, means on cooldown forks, each seed's end, the static envelope."""
    tops = []
    for label, look in looks(trials.arms).items():
        runs = list(trials.sound(label).values())
        dots: Look = look | {"linestyle": ""}
        curves = [[(point[axis], point["val_loss"]) for point in run.summary["val_curve"]] for run in runs]
        costs, means = _means(curves)
        axes.plot(costs, means, color=look["color"], linestyle=look["linestyle"], linewidth=1.3, zorder=2)
        axes.plot(*_means([np.transpose(run.points(axis))[:-1] for run in runs]), markersize=3, zorder=4, **dots)
        axes.plot([run.summary[axis] for run in runs], [run.loss for run in runs], markersize=4.5, zorder=4, **dots)
        tops += means[costs > 0.3 * max(costs, default=0)][:1].tolist()
        for run in runs:
            fractions, spent = np.transpose([(p["budget_fraction"], p[axis]) for p in run.summary["val_curve"]])
            at = np.interp([graft["budget_fraction"] for graft in run.summary["grafts"]], fractions, spent)
            axes.plot(at, np.interp(at, costs, means), "^", color=look["color"], mec="white", mew=0.6, markersize=7)
        axes.plot([], [], label=label, markersize=5, **look)
    envelope = draw_envelope(trials.statics.values(), axis)
    axes.plot(*envelope, color="black", linewidth=2.6, alpha=0.5, label="best static, annealed")
    axes.plot([], [], "^", color="gray", label="graft")
    low, high = _range(trials)
    axes.set_ylim(low, max([high, *tops]))
    axes.locator_params(axis="x", nbins=6)  # more would touch each other
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=AXES[axis], ylabel="validation loss (nats)")


def draw_differences(axes: Axes, trials: Trials) -> None:
    """Every label's final losses minus the best static size's on the same seed: seeds, mean, 95 % interval."""
    base, found = trials.sound(trials.best_static), {}
    for label in trials.test:
        values = [run.loss - base[seed].loss for seed, run in trials.sound(label).items() if seed in base]
        if values:
            found[label] = np.array(values)
    intervals = {label: Interval.of(values, trials.sequential) for label, values in found.items()}
    for label, interval in sorted(intervals.items(), key=lambda item: item[1].mean):
        name = f"{label} {interval.mean:+.3f}"  # what is beyond the range is told by its name
        axes.errorbar(interval.mean, name, xerr=interval.half or 0, color="black", capsize=4, marker="|", markersize=12)
        dots: Look = looks(trials.arms)[label] | {"linestyle": ""}
        axes.plot(found[label], [name] * len(found[label]), markersize=5, **dots)
    middle = float(np.mean([run.loss for run in base.values()])) if base else 0.0
    shown = [(each.mean, each.mean - (each.half or 0), each.mean + (each.half or 0)) for each in intervals.values()]
    axes.set_xlim(*_limits([edge - middle for edge in _range(trials)], shown))
    axes.axvline(0, color="black", linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel(f"final loss minus that of {trials.best_static or 'a static size'} on the same seed (nats)")
    axes.invert_yaxis()


def draw_budgets(axes: Axes, over: OverBudgets, what: Literal["regret", "saved"]) -> None:
    """Every label's regret, or the part of the budget that it saves, over the budgets, with 95 % intervals."""
    arms, edges = {label: arm for trials in over.points for label, arm in trials.arms.items()}, [0.0]
    sizes = []  # intervals of static ones: one far too large or small for a budget may lie outside
    means = {row.arm: row.cells()[0] for row in over.rows if row.budget is None}
    for number, (label, look) in enumerate(looks(arms).items()):
        rows = [row for row in over.rows if row.arm == label and row.budget and row.interval]
        if what == "saved":
            rows = [row for row in rows if row.saved]
            ends = [(*row.saved, *row.saved * 2)[:3] for row in rows]
        else:
            halves = [(row.interval.mean, row.interval.half or 0.0) for row in rows if row.interval]
            ends = [(mean, mean - half, mean + half) for mean, half in halves]
        mean, low, high = np.reshape(ends, (-1, 3)).T
        least = np.maximum(low, -1.0) if what == "saved" else low
        if arms[label] == "static":
            sizes += zip(mean, least, high, strict=True)
        else:
            edges += [*least, *high]
        beside = np.array([row.budget for row in rows], float) * 1.01 ** (number - len(arms) / 2)
        bars, told = (mean - low, high - mean), f"{label}: {means[label]}"
        axes.errorbar(beside, mean, yerr=bars, capsize=3, label=told, markersize=5, **look)
    axes.axhline(0, color="black", linewidth=2.6, alpha=0.5, label="best static at each budget", zorder=1)
    axes.set(ylim=_limits(edges, sizes), xscale="log", xlabel=f"budget ({AXES[over.points[0].axis]})")
    axes.set_xticks(over.budgets, list(map(EngFormatter(sep=""), over.budgets)))
    axes.minorticks_off()
    axes.set_ylabel("regret: loss minus the best static's (nats)")
    if what == "saved":
        axes.set_ylabel("part of the budget saved, down to −100%")
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))


def save_picture(drawn: Sequence[Trials | OverBudgets], file: Path | IO[bytes], kind: str) -> None:
    """All of it as `png` or `svg`, a few rows each: regrets over budgets; or a grid point's losses over each cost."""
    heights = [1 if isinstance(one, OverBudgets) else math.ceil((len(AXES) + 2) / COLUMNS) for one in drawn]
    rows = sum(heights)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(rows, COLUMNS, figsize=(17, 4.5 * rows), layout="constrained", squeeze=False)
        for trials, end, height in zip(drawn, np.cumsum(heights), heights, strict=True):
            first, differences, *cells = grid[end - height : end].flat
            if isinstance(trials, OverBudgets):
                draw_budgets(first, trials, "regret")
                draw_budgets(differences, trials, "saved")
                first.set_title(trials.title)
                cells[0].set_axis_off()
                cells[0].legend(*first.get_legend_handles_labels(), loc="center left", title="mean regret over budgets")
                continue
            others = [axis for axis in AXES if axis != trials.axis]
            draw_losses(first, trials, trials.axis)
            first.set_title(trials.title)
            draw_differences(differences, trials)
            for axes, axis in zip(cells, others, strict=False):
                draw_losses(axes, trials, axis)
            for rest in cells[len(others) :]:
                rest.set_axis_off()
            handles, labels = first.get_legend_handles_labels()
            cells[len(others)].legend(handles, labels, loc="center left", ncols=1 + len(labels) // 16)
        figure.savefig(file, dpi=100, format=kind, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)


def _means(curves: Sequence[Any]) -> np.ndarray:
    return np.reshape([np.mean(at, axis=0) for at in zip(*curves, strict=False)], (-1, 2)).T


def _range(trials: Trials) -> tuple[float, float]:  # of the best static size's final losses and of what is not static
    kept = [label for label in trials.test if label not in trials.statics or label == trials.best_static]
    ends = [run.loss for label in kept for run in trials.sound(label).values()] or [0.0, 1.0]
    room = max(0.3 * (max(ends) - min(ends)), 0.005)  # nats
    return min(ends) - room, max(ends) + room


def _limits(edges: Sequence[float], shown: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Limits with room for the edges, and for the whole interval (mean, ends) of each mean within them."""
    bottom, top = min(edges), max(edges)
    room = 0.1 * (top - bottom) or 0.01
    for mean, low, high in sorted(shown, key=lambda interval: abs(interval[0])):
        if bottom - room <= mean <= top + room:
            bottom, top = min(bottom, low), max(top, high)
            room = 0.1 * (top - bottom) or 0.01
    return bottom - room, top + room
