"""The picture of one run: validation loss over the budget with its grafts, and the network layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image

from esper.pipelines.common.single_run import saved_run
from esper.pipelines.reports.figures import PALETTE, STYLE
from esper.pipelines.reports.runs import AXES
from esper.platform import checkpoint
from esper.platform.console import counted
from esper.platform.errors import UserError, in_a_sentence, reason
from esper.platform.provenance import SPEC
from esper.platform.spec import RunSpec, load_spec
from esper.platform.storage import read_json
from esper.workers.kasmina.registry import Planted, make_blueprints, shape_without
from esper.workers.tolaria.hosts import start_shape

BORN = "0.75"  # the grey of what a run began with
WIDTHS = {"width": 1.0}  # share of a row that the widest of a kind takes; other kinds get less
NARROW = 0.4
FRAME, LAST = 330, 2700  # milliseconds that an animation shows a decision for, and its end

Layer = dict[str, Any]  # as a summary's `shape` has it


@dataclass(frozen=True)
class Growth:
    """A run's records, and its network's layers at each point of the curve, from input to output."""

    title: str
    axis: str  # the budget's
    amount: float
    curve: Sequence[Mapping[str, Any]]
    changes: Sequence[Mapping[str, Any]]  # grafts and prunes, as summaries have them
    layers: Sequence[Sequence[Layer]]

    @classmethod
    def read(cls, run: Path) -> Self:
        """The run in a folder, to its newest checkpoint where it has not ended; UserError where there is none."""
        ended = run / "summary.json"
        if (run / "trials").exists():
            raise UserError(f"{run} is a sweep, of many runs: name one of the folders in {run / 'trials'}.")
        saved = None if ended.exists() else saved_run(run)
        with in_a_sentence(f"{run} is no run that can be drawn", "name an output folder of `esper train`"):
            spec = load_spec(run / SPEC)
            kept = checkpoint.read(saved)[0] if saved else read_json(ended, str(ended), "an ended run")
            curve = kept.get("val_curve") or kept["curve"]
            changes = sorted((*kept["grafts"], *kept["prunes"]), key=lambda change: change["decision"])
            layers = layers_over(spec, changes, kept["rollbacks"], len(curve))
            return cls(run.name, spec.budget.axis, spec.budget.amount, curve, changes, layers)

    def told(self, at: int) -> str:
        point, layers = self.curve[at], counted(len(self.layers[at]), "layer")
        return f"loss {point['val_loss']:.3f}, {point['parameters']:,} parameters in {layers}"


def layers_over(
    spec: RunSpec, changes: Sequence[Mapping[str, Any]], rollbacks: Sequence[Mapping[str, Any]], points: int
) -> list[list[Layer]]:
    """The layers at each of a curve's points: the run's changes made again on its shape alone."""
    blueprints, shape = make_blueprints(spec.growth.blueprints), start_shape(spec, vocab_size=1)
    seeds: dict[int, Planted] = {}
    numbers = count()
    found = [shape.layers_as_json()]
    for decision in range(points - 1):
        for change in changes:
            if change["decision"] == decision and "identity" in change:  # a graft
                shape, seeds[next(numbers)] = blueprints[change["blueprint"]].planted(shape, change["site"])
            elif change["decision"] == decision:
                shape, seeds = shape_without(shape, seeds, blueprints, change["site"])
        for rollback in rollbacks:
            if rollback["decision"] == decision and rollback["removed"]:  # "blueprint at site"
                shape, seeds = shape_without(shape, seeds, blueprints, rollback["removed"].rpartition(" ")[2])
        found.append(shape.layers_as_json())
    return found


def draw(figure: Figure, growth: Growth, at: int) -> None:
    """The run up to a point: the loss left, the network then right."""
    figure.clear()
    losses, network = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(losses, growth, at)
    _draw_network(network, growth, at)
    figure.suptitle(f"{growth.title}: {growth.told(at)}", fontsize=10)


def save_picture(growth: Growth, out: Path) -> None:
    """The run as it stands, of the kind that the file's name says."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 4.2), layout="constrained")
        draw(figure, growth, len(growth.curve) - 1)
        with _written(out, "ends in .png, .svg or .pdf"):
            figure.savefig(out, dpi=110)
        plt.close(figure)


def save_animation(growth: Growth, out: Path) -> None:
    """The run as it went, a frame a decision, as a GIF."""
    if out.suffix != ".gif":
        raise UserError(f"an animation is a GIF, and {out} is not called so: name a file that ends in .gif.")
    with plt.rc_context(STYLE), _written(out, "lies in a folder that is there"):
        canvas, frames = FigureCanvasAgg(Figure(figsize=(8.6, 3.6), dpi=80, layout="constrained")), []
        for at in range(len(growth.curve)):
            draw(canvas.figure, growth, at)
            canvas.draw()
            frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
        lasting = [FRAME] * (len(frames) - 1) + [LAST]
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=lasting, loop=0)


@contextmanager
def _written(out: Path, how: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{out} cannot be written ({reason(error)}): name a file that {how}.") from None


def _draw_losses(axes: Axes, growth: Growth, at: int) -> None:
    spent = [point[growth.axis] for point in growth.curve]
    losses = [point["val_loss"] for point in growth.curve]
    axes.plot(spent[: at + 1], losses[: at + 1], "o-", color="0.35", markersize=3, linewidth=1.4)
    for number, change in enumerate(growth.changes):
        if change["decision"] < at:
            where, loss = spent[change["decision"]], losses[change["decision"]]
            up = "identity" in change
            axes.plot(where, loss, "^" if up else "v", color=PALETTE[1], markersize=8, mec="white")
            what = f"{'+' if up else '−'} {change['blueprint']}"
            offset = (4, 8 + 11 * (number % 2))  # neighbours at two heights
            axes.annotate(what, (where, loss), xytext=offset, textcoords="offset points", fontsize=8)
    later = losses[1:] or losses  # the first loss is chance: it would leave no room for the rest
    room = 0.06 * (max(later) - min(later)) or 0.1
    axes.set(xlim=(0, 1.02 * growth.amount), ylim=(min(later) - room, max(later) + 3 * room))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=AXES.get(growth.axis, growth.axis), ylabel="validation loss (nats)")


def _draw_network(axes: Axes, growth: Growth, at: int) -> None:
    """A row a layer, the input at the bottom: grey what the run began with, in colour what it has grown."""
    names = dict.fromkeys(name for layers in growth.layers for layer in layers for name in layer)
    kinds = dict(zip([name for name in names if name not in ("uid", "stage")], PALETTE, strict=False))
    born = {layer["uid"]: layer for layer in growth.layers[0]}
    most = {kind: max(_count(layer, kind) for layers in growth.layers for layer in layers) for kind in kinds}
    left = 0.0
    for kind, color in kinds.items():
        share = WIDTHS.get(kind, NARROW)
        if most[kind]:
            for row, layer in enumerate(growth.layers[at]):
                now, then = _count(layer, kind), _count(born.get(layer["uid"], {}), kind)
                length = share * now / most[kind]
                axes.barh(row, length, 0.7, left, color=color)
                axes.barh(row, share * min(now, then) / most[kind], 0.7, left, color=BORN)
                if now:
                    axes.text(left + length / 2, row, f"{now:,}", ha="center", va="center", fontsize=8)
            axes.text(left, -0.7, kind, color=color, ha="left", va="center", fontsize=9)
            left += share + 0.1
    rows = max(map(len, growth.layers))
    axes.set(xlim=(0, left), ylim=(-1, max(rows, 3) - 0.4))
    axes.set_yticks(range(len(growth.layers[at])), [f"h{layer['uid']}" for layer in growth.layers[at]])
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.set_title("input at the bottom\ngrey: at the start; in colour: grown", fontsize=9)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)


def _count(layer: Layer, kind: str) -> int:
    """How many a layer has; of experts, their neurons."""
    value = layer.get(kind, 0)
    return value if isinstance(value, int) else sum(each["width"] for each in value)
