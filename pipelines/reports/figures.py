"""The figures of a report: small ones as SVG for the page, the same ones together as one PNG.

A label has one colour and one marker everywhere: static sizes are greys, arms take the palettes of Okabe and Ito and of
Tol (told apart with any kind of colour vision; https://jfly.uni-koeln.de/color/, https://sronpersonalpages.nl/~pault/),
and what was made after an arm (`static_final:tamiyo`) has that arm's colour, hollow, in a shape of its own.

What is looked for are hundredths of a nat at the end, among arms that may be tenths apart: losses are shown over the
range of the arms that grow and of the best static size, and what lies beyond is told at the edge.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.content import AXIS_NAMES, Report, Section, short
from esper.pipelines.reports.envelope import EnvelopePoint
from esper.pipelines.reports.tables import AXES
from esper.pipelines.reports.verdict import ArmRow

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),  # Okabe–Ito without black and yellow
    *("#332288", "#882255", "#999933", "#AA4499"),  # Tol's muted ones that are unlike these
)
MARKERS = ("o", "P", "v")  # one more for each time that the palette comes round
FOLLOWERS = {"static_final": "s", "static_lrpath": "^"}  # markers; of all others that were made after an arm "D"
GREYS = ("#bdbdbd", "#5f6670")  # of the smallest and the largest static size
INK, ENVELOPE = "#22262b", "#22262b"
APART = 0.05  # of the budget: two forks of a run are at least so far apart
LEAST = 0.01  # nats: the least range that is shown
EVENTS = {"graft": "o", "prune": "X", "rollback": "<"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#8a9099",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": "#e3e6ea",
    "text.color": INK,
    "xtick.color": "#4a5058",
    "ytick.color": "#4a5058",
    "svg.hashsalt": "esper",  # the same figure has the same ids
}
WIDTH = 5.2  # inches: legible when a phone shows it at two thirds


@dataclass(frozen=True)
class Look:
    """How a label is drawn."""

    color: str
    marker: str = "o"
    hollow: bool = False
    line: Literal["-", "--", ":"] = "-"

    @property
    def points(self) -> dict[str, Any]:
        """For matplotlib's `scatter`."""
        face = "white" if self.hollow else self.color
        return {"marker": self.marker, "facecolor": face, "edgecolor": self.color}


def looks(labels: Sequence[str], arms: dict[str, str]) -> dict[str, Look]:
    """A look for each label; `arms` tells each label's arm."""
    static = [label for label in labels if arms[label] == "static"]
    own = [label for label in labels if arms[label] != "static" and ":" not in label]
    own += [label.split(":", 1)[1] for label in labels if ":" in label]
    places = {label: i for i, label in enumerate(dict.fromkeys(own))}
    found = {}
    for label in labels:
        if label in static:
            share = static.index(label) / max(1, len(static) - 1)
            found[label] = Look(_between(*GREYS, share), line="--")
            continue
        base = label.split(":", 1)[-1]
        i = places[base]
        color = found[base].color if base in static else PALETTE[i % len(PALETTE)]
        marker = MARKERS[i // len(PALETTE) % len(MARKERS)]
        if base != label:
            again = i >= len(PALETTE)  # another arm has the colour
            marker = FOLLOWERS.get(label.split(":")[0], "D")
            found[label] = Look(color, marker, hollow=True, line="--" if again else ":")
            continue
        found[label] = Look(color, marker)
    return found


def report_looks(report: Report) -> dict[str, Look]:
    """A look for each of a report's labels."""
    return looks(report.labels, {row.label: row.arm for section in report.sections for row in section.verdict.rows})


def _between(low: str, high: str, share: float) -> str:
    first, last = (np.array(to_rgb(color)) for color in (low, high))
    red, green, blue = (float(part) for part in first + share * (last - first))
    return to_hex((red, green, blue))


# -- Panels ------------------------------------------------------------------------------------------------------------


def draw_losses(axes: Axes, section: Section, axis: str, styles: dict[str, Look]) -> None:
    """Mean annealed losses of each label against one cost, final losses of every seed, and the envelope of statics."""
    curves = section.test("curves")
    annealed = curves[(curves["kind"] == "annealed") & curves["val_loss"].notna() & (curves[axis] > 0)]
    finals, tops = _ended(section), []
    for label in section.labels:
        own, look = annealed[annealed["label"] == label].sort_values("budget_fraction"), styles[label]
        fork = (own["budget_fraction"].diff() > APART).cumsum()
        means = own.groupby(fork).agg({axis: lambda x: float(np.exp(np.log(x).mean())), "val_loss": "mean"})
        axes.plot(means[axis], means["val_loss"], color=look.color, linestyle=look.line, linewidth=1, zorder=2)
        tops += means["val_loss"].tolist()
        ends = finals[finals["label"] == label]
        axes.scatter(ends[axis], ends["val_loss"], s=16, linewidth=0.9, zorder=4, **look.points)
    _draw_envelope(axes, section.verdict.envelope.get(axis, ()))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(AXIS_NAMES[axis])
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(visible=True)
    low, high = _span(finals[finals["label"].isin(_compared(section))]["val_loss"])
    room = min(0.6 * (high - low), max([high, *tops]) - high)  # for where the curves come from
    axes.set_ylim(low - 0.08 * (high - low), high + room + 0.08 * (high - low))


def _draw_envelope(axes: Axes, points: Sequence[EnvelopePoint]) -> None:
    """Thick where every size has a loss, dotted where one has none; each stretch begins where the last one ended."""
    before: list[EnvelopePoint] = []
    for complete, stretch in groupby(points, key=lambda point: point.complete):
        part = [*before, *stretch]
        style: dict[str, Any] = {"linewidth": 3, "alpha": 0.75} if complete else {"linewidth": 1.8, "linestyle": ":"}
        axes.plot([point.cost for point in part], [point.loss for point in part], color=ENVELOPE, zorder=3, **style)
        before = part[-1:]


def _compared(section: Section) -> list[str]:
    """The labels whose losses make the range: the best static size and all that are not static; all if none grows."""
    verdict = section.verdict
    kept = [row.label for row in verdict.rows if row.arm != "static" or row.size == verdict.size]
    return kept if any(row.arm != "static" for row in verdict.rows) else section.labels


def _span(values: Any) -> tuple[float, float]:
    """Least and greatest of some numbers, never quite the same."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(np.min(values)), float(np.max(values))
    room = max(0.0, LEAST - (high - low)) / 2
    return low - room, high + room


def _ended(section: Section) -> Any:
    """The test runs that have a final loss."""
    finals = section.test("finals")
    return finals[finals["val_loss"].notna() & (finals["status"] == "FINISHED")]


def draw_strip(axes: Axes, section: Section, styles: dict[str, Look]) -> None:
    """Every label's final losses, a dot per seed, with their mean and its 95 % interval; the best on top."""
    finals = section.test("finals")
    rows = _by_loss(section)
    envelope = best_static(section)
    if envelope is not None and envelope.loss is not None:
        axes.axvline(envelope.loss.mean, color=ENVELOPE, linewidth=1, linestyle=":", zorder=1)
    started = finals["label"].value_counts()
    names = [
        row.label + (f"\n{row.seeds} of {started[row.label]} ended" if row.seeds < started[row.label] else "")
        for row in rows
    ]
    dots = [list(row.losses.values()) for row in rows]
    _draw_rows(axes, names, [styles[row.label] for row in rows], dots, _compared_rows(section, rows))
    axes.set_xlabel("final validation loss (nats per token)")


def draw_differences(axes: Axes, section: Section, styles: dict[str, Look]) -> None:
    """Every label's final losses minus the best static size's on the same seed, in the strip plot's order."""
    envelope = best_static(section)
    losses = envelope.losses if envelope else {}
    rows = [row for row in _by_loss(section) if row is not envelope]
    dots = [[loss - losses[seed] for seed, loss in row.losses.items() if seed in losses] for row in rows]
    axes.axvline(0, color=ENVELOPE, linewidth=1, linestyle=":", zorder=1)
    names = [row.label for row in rows]
    _draw_rows(axes, names, [styles[name] for name in names], dots, _compared_rows(section, rows), "+.3f")
    axes.set_xlabel(f"loss minus that of {envelope.label if envelope else 'a static size'} on the same seed (nats)")


def best_static(section: Section) -> ArmRow | None:
    """The row of the static size that stands for the envelope at equal budget."""
    rows = section.verdict.rows
    return next((row for row in rows if row.arm == "static" and row.size == section.verdict.size), None)


def _by_loss(section: Section) -> list[ArmRow]:
    return sorted(section.verdict.rows, key=lambda row: row.loss.mean if row.loss else np.inf)


def _compared_rows(section: Section, rows: Sequence[ArmRow]) -> list[int]:
    compared = _compared(section)
    return [place for place, row in enumerate(rows) if row.label in compared]


def _draw_rows(
    axes: Axes,
    names: Sequence[str],
    looks: Sequence[Look],
    dots: Sequence[Sequence[float]],
    compared: Sequence[int],
    form: str = ".3f",
) -> None:
    """A row per label: a dot per seed, their mean and its 95 % interval; `compared` rows make the range."""
    low, high = _span([value for place in compared for value in dots[place]])
    low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
    for place, (look, values) in enumerate(zip(looks, dots, strict=True)):
        if not values:
            continue
        found = Interval.of(np.array(values))
        if not low <= found.mean <= high:
            left = found.mean < low
            told = f"◂ {found.mean:{form}}" if left else f"{found.mean:{form}} ▸"
            side: Any = "left" if left else "right"
            axes.text(low if left else high, place, told, ha=side, va="center", fontsize=9, color="#4a5058")
            continue
        half = found.half or 0.0
        axes.plot([found.mean - half, found.mean + half], [place, place], color=INK, linewidth=1.2, zorder=2)
        axes.plot([found.mean] * 2, [place - 0.28, place + 0.28], color=INK, linewidth=2, zorder=2)
        jitter = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        axes.scatter(values, place + jitter, s=24, linewidth=1, zorder=3, **look.points)
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")


def draw_timeline(axes: Axes, section: Section, label: str, colors: dict[str, str]) -> None:
    """When a label's networks changed, a line per seed: colour tells the blueprint, shape the event, hollow undone."""
    changes, finals = section.test("timeline"), section.test("finals")
    changes = changes[changes["label"] == label]
    seeds = sorted(set(finals[finals["label"] == label]["seed"]))
    axes.hlines(range(len(seeds)), 0, 1, color="#c9ced5", linewidth=1.2, zorder=1)
    for change in changes.to_dict("records"):
        color = colors.get(change["blueprint"] or "", "#6b7280")
        undone = change["event"] == "graft" and change["outcome"] in ("pruned", "rolled back")
        axes.scatter(
            [change["budget_fraction"]],
            [seeds.index(change["seed"])],
            s=46,
            marker=EVENTS.get(change["event"], "o"),
            facecolor="white" if undone else color,
            edgecolor=color,
            linewidth=1.6 if undone else 0.8,
            zorder=3 if change["event"] == "graft" else 4,
        )
    axes.set_title(label)
    axes.set_xlim(-0.02, 1.02)
    axes.set_yticks(range(len(seeds)), [f"seed {seed}" for seed in seeds])
    axes.set_ylim(max(1, len(seeds)) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("budget spent")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def blueprint_colors(report: Report) -> dict[str, str]:
    """A colour for each blueprint that was ever used."""
    used = [change for section in report.sections for change in section.test("timeline")["blueprint"].dropna()]
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(sorted(set(used)))}


# -- SVG and PNG -------------------------------------------------------------------------------------------------------


def svg(draw: Callable[[Axes], None], height: float, about: str) -> str:
    """One panel as an SVG document, `height` inches tall."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Title": about, "Date": None})
        plt.close(figure)
    return text.getvalue()


def strip_height(section: Section) -> float:
    """Inches that a strip plot needs."""
    return 0.9 + 0.32 * len(section.labels)


def timeline_height(section: Section, label: str) -> float:
    """Inches that a timeline needs."""
    finals = section.test("finals")
    return 1.0 + 0.26 * finals[finals["label"] == label]["seed"].nunique()


def save_picture(report: Report, path: Path) -> None:
    """All sections' panels in one PNG, one below the other."""
    styles, colors = report_looks(report), blueprint_colors(report)
    heights = [_section_height(section) for section in report.sections]
    with plt.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12)
        figure = plt.figure(figsize=(15, sum(heights) + 0.5), layout=layout)
        figure.suptitle(f"{report.experiment} · {report.sweep.name}", x=0.01, ha="left", fontsize=15, weight="bold")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, section in zip(parts, report.sections, strict=True):
            _draw_section(part, section, styles, colors)
        figure.savefig(path, dpi=100, format="png")
        plt.close(figure)


def _upper_height(section: Section) -> float:
    """Inches of the losses: two strip plots, one below the other, or two panels."""
    return max(7.6, 2 * strip_height(section) + 1.2)


def _section_height(section: Section) -> float:
    lines = -(-len(section.grown()) // 3)
    return (
        _upper_height(section)
        + 0.3
        + lines * max([0.0, *(timeline_height(section, label) + 0.3 for label in section.grown())])
    )


def _draw_section(part: Any, section: Section, styles: dict[str, Look], colors: dict[str, str]) -> None:
    grown = section.grown()
    grid = f"{section.title}; " if section.verdict.grid != "{}" else ""
    part.suptitle(f"{grid}budget {section.budget}", x=0.01, ha="left", fontsize=12)
    if grown:
        upper = _upper_height(section)
        above, below = part.subfigures(2, 1, height_ratios=(upper, _section_height(section) - upper))
        panels = below.subplots(-(-len(grown) // 3), 3, squeeze=False)
        for axes, label in zip(panels.flat, grown, strict=False):
            draw_timeline(axes, section, label, colors)
        for axes in list(panels.flat)[len(grown) :]:
            axes.set_visible(False)
        _timeline_key(below, colors)
    else:
        above = part
    panels = above.subplot_mosaic(
        [["parameter_seconds", "flops", "strip"], ["seconds", "tokens", "differences"]], width_ratios=(1, 1, 1.15)
    )
    for axis in AXES:
        draw_losses(panels[axis], section, axis, styles)
    draw_strip(panels["strip"], section, styles)
    draw_differences(panels["differences"], section, styles)
    panels["strip"].set_title("final losses: a dot per seed, mean, 95 % interval")
    panels["parameter_seconds"].set_title("annealed loss against cost")
    _loss_key(above, section, styles)


def _loss_key(part: Any, section: Section, styles: dict[str, Look]) -> None:
    handles = [Line2D([], [], color=ENVELOPE, linewidth=3, alpha=0.75, label="envelope of static sizes")]
    for label in section.labels:
        look = styles[label]
        handles.append(
            Line2D(
                [],
                [],
                color=look.color,
                linestyle=look.line,
                marker=look.marker,
                markersize=5,
                markerfacecolor="white" if look.hollow else look.color,
                label=label,
            )
        )
    part.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)


def _timeline_key(part: Any, colors: dict[str, str]) -> None:
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="", markersize=6, label=name)
        for name, color in colors.items()
    ]
    grey = {"color": "#6b7280", "linestyle": "", "markersize": 6}
    handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="graft later undone", **grey))
    handles += [Line2D([], [], marker=EVENTS[event], label=event, **grey) for event in ("prune", "rollback")]
    part.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
