"""The figures of a report: each as SVG for the page, all of a sweep together as one PNG.

A label has one colour everywhere: greys for static sizes; followers (`static_final:tamiyo`) are hollow and dotted.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.baselines import Trials, draw_envelope
from esper.pipelines.reports.page import AXIS_NAMES, short
from esper.pipelines.reports.runs import AXES
from esper.pipelines.reports.verdict import Verdict

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),  # Okabe–Ito without black and yellow
    *("#332288", "#882255", "#999933", "#AA4499"),  # Tol's muted ones that are unlike these
)
MARKERS = ("o", "P", "v", "d", "<")  # one more for each time that the palette comes round
FOLLOWERS = {"static_final": "s", "static_lrpath": "h"}  # markers; of all others that follow an arm "D"
EVENTS = {"graft": "^", "prune": "X", "rollback": "<"}
INK, SOFT = "#22262b", "#6b7280"
LEAST = 0.01  # nats: the least range that is shown
STYLE: dict[Any, Any] = {
    **{"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True},
    **{"axes.edgecolor": "#8a9099", "grid.color": "#e3e6ea", "axes.labelcolor": INK, "text.color": INK},
    "svg.hashsalt": "esper",  # the same figure has the same ids
}
Look = dict[str, Any]  # color, marker, linestyle and markerfacecolor, as matplotlib's `plot` takes them


def looks(arms: Mapping[str, str]) -> dict[str, Look]:
    """How each label (→ its arm) is drawn."""
    static = [label for label, arm in arms.items() if arm == "static"]
    greys = np.linspace(0.72, 0.35, max(1, len(static))).round(3)
    colored = [label for label in dict.fromkeys(label.split(":", 1)[-1] for label in arms) if label not in static]
    found: dict[str, Look] = {}
    for label in arms:
        kind, follows, of = label.partition(":")
        if (of or label) in static:
            color, marker = str(greys[static.index(of or label)]), "o"
        else:
            turn, place = divmod(colored.index(of or label), len(PALETTE))
            color, marker = PALETTE[place], MARKERS[turn % len(MARKERS)]
        marker = FOLLOWERS.get(kind, "D") if follows else marker
        line = ":" if follows else "--" if label in static else "-"
        found[label] = {"color": color, "marker": marker, "linestyle": line, "mfc": "white" if follows else color}
    return found


def draw_losses(axes: Axes, trials: Trials, axis: str, *, legend: bool = False) -> None:
    """Loss against a cost: mid-run means, grafts, means on cooldown forks, each seed's end, the static envelope."""
    tops = []
    for label, look in looks(trials.arms).items():
        runs = list(trials.sound(label).values())
        dots: Look = {**look, "linestyle": ""}
        costs, means = _means(
            [[(point[axis], point["val_loss"]) for point in run.summary["val_curve"]] for run in runs]
        )
        axes.plot(costs, means, color=look["color"], linestyle=look["linestyle"], linewidth=1.3, zorder=2)
        axes.plot(*_means([np.transpose(run.points(axis))[:-1] for run in runs]), markersize=3, zorder=4, **dots)
        tops += means[costs > 0.3 * max(costs, default=0)][:1].tolist()
        for run in runs:
            axes.plot(run.final(axis), run.loss, markersize=4.5, zorder=4, **dots)
            fractions, spent = np.transpose([(p["budget_fraction"], p[axis]) for p in run.summary["val_curve"]])
            at = np.interp([graft["budget_fraction"] for graft in run.summary["grafts"]], fractions, spent)
            axes.plot(at, np.interp(at, costs, means), "^", color=look["color"], mec="white", mew=0.6, markersize=7)
        axes.plot([], [], label=label, markersize=5, **look)
    envelope = draw_envelope(trials.statics.values(), axis)
    axes.plot(*envelope, color=INK, linewidth=2.6, alpha=0.55, label="best static, annealed")
    axes.plot([], [], "^", color=SOFT, label="graft")
    low, high = _span([run.loss for label in _compared(trials) for run in trials.sound(label).values()])
    high = max([high, *tops])
    axes.set_ylim(low - 0.07 * (high - low), high + 0.07 * (high - low))
    axes.locator_params(axis="x", nbins=6)  # more would touch each other
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(AXIS_NAMES[axis])
    axes.set_ylabel("validation loss (nats per token)")
    if legend:
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1.03))


def draw_differences(axes: Axes, trials: Trials) -> None:
    """Every label's final losses minus the best static size's on the same seed: seeds, mean, 95 % interval."""
    base, differences = trials.sound(trials.best_static), {}
    for label in trials.test:
        differences[label] = [run.loss - base[seed].loss for seed, run in trials.sound(label).items() if seed in base]
    differences = dict(sorted(differences.items(), key=lambda item: np.mean(item[1] or [np.inf])))
    low, high = _span([value for label in _compared(trials) for value in differences[label]])
    low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
    axes.axvline(0, color=INK, linewidth=1, linestyle=":", zorder=1)
    for place, (label, values) in enumerate(differences.items()):
        found = Interval.of(np.array(values)) if values else None
        if found and low <= found.mean <= high:
            axes.errorbar(found.mean, place, xerr=found.half or 0, color=INK, capsize=4, marker="|", markersize=12)
            dots: Look = {**looks(trials.arms)[label], "linestyle": ""}
            axes.plot(values, [place] * len(values), markersize=5, **dots)
        elif found:  # beyond the range of the arms that grow and the best static size: told at the edge
            left = found.mean < low
            text, side = (f"◂ {found.mean:+.3f}", "left") if left else (f"{found.mean:+.3f} ▸", "right")
            axes.text(low if left else high, place, text, horizontalalignment=side, va="center", fontsize=9, color=SOFT)
    axes.set_xlabel(f"final loss minus that of {trials.best_static or 'a static size'} on the same seed (nats)")
    axes.set_xlim(low, high)
    _label_rows(axes, list(differences))


def draw_growth(axes: Axes, trials: Trials) -> None:
    """When each test run changed its network: colour shows the blueprint, shape the event, hollow an undone one."""
    runs = [run for run in trials.test_runs() if run.events()]
    colors: dict[str | None, str] = {}
    for place, run in enumerate(runs):
        for event in run.events():
            color = colors.setdefault(event["blueprint"], PALETTE[len(colors) % len(PALETTE)])
            face = "white" if event.get("outcome") in ("pruned", "rolled back") else color
            at, marker = event["budget_fraction"], EVENTS[event["event"]]
            axes.plot(at, place, marker, color=color, mfc=face, markersize=7, zorder=3)
    for name, color in colors.items():
        axes.plot([], [], "^", color=color, label=name or "unnamed")
    for event in ("prune", "rollback"):
        axes.plot([], [], EVENTS[event], color=SOFT, label=event)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=8, fontsize=9)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("budget spent")
    _label_rows(axes, [f"{run.label}, seed {run.seed}" for run in runs])


def _means(curves: Sequence[Any]) -> np.ndarray:
    return np.reshape([np.mean(at, axis=0) for at in zip(*curves, strict=False)], (-1, 2)).T


def _compared(trials: Trials) -> list[str]:
    kept = [label for label, arm in trials.arms.items() if arm != "static" or label == trials.best_static]
    return kept if len(kept) > 1 else list(trials.test)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = max(0.0, LEAST - (high - low)) / 2
    return low - room, high + room


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def svgs(trials: Trials) -> dict[str, str]:
    """Figure name → SVG in base64, so that ids of two files cannot collide."""
    changed = sum(bool(run.events()) for run in trials.test_runs())
    return {axis: _svg(5.2, 3.5, draw_losses, trials, axis) for axis in AXES} | {
        "training": _svg(9.6, 4.6, partial(draw_losses, legend=True), trials, trials.axis),
        "differences": _svg(9.6, 1 + 0.34 * len(trials.test), draw_differences, trials),
        "growth": _svg(9.6, 1 + 0.24 * changed, draw_growth, trials),
    }


def _svg(width: float, height: float, draw: Callable[..., None], *what: Any) -> str:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        draw(axes, *what)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return base64.b64encode(file.getvalue()).decode()


def save_picture(title: str, verdicts: Sequence[Verdict], path: Path) -> None:
    """Training, final losses and growth in one PNG, a row per grid point."""
    with plt.rc_context(STYLE):
        size = (17, 5.2 * len(verdicts) + 0.4)
        shape: dict[str, Any] = {"width_ratios": (1.4, 1, 1), "squeeze": False, "layout": "constrained"}
        figure, rows = plt.subplots(len(verdicts), 3, figsize=size, **shape)
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, weight="bold")
        for (losses, differences, growth), verdict in zip(rows, verdicts, strict=True):
            draw_losses(losses, verdict.trials, verdict.trials.axis, legend=True)
            draw_differences(differences, verdict.trials)
            draw_growth(growth, verdict.trials)
            losses.set_title(verdict.trials.title)
        figure.savefig(path, dpi=100, format="png")
        plt.close(figure)
