"""The search for the best static size at a budget, on tuning seeds (`--sizes auto`), as wide as what growing can reach.

By coordinate descent: of the best size so far, the neighbours on the first axis that has untried ones are tried next:
a layer more or less, MLPs about 1.5 times as wide or narrow (by whole grafts, or quarters of the preset's width where
these are less), twice or half the heads. It ends where all neighbours of the best were tried, and none is better.
"""

import math
from collections.abc import Mapping

from esper.pipelines.sweeps.plan import check_budget
from esper.pipelines.sweeps.sizes import Size
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec
from esper.workers.kasmina.registry import blueprints_of

WIDER = 1.5
RUNGS = 40  # widths below and above the preset's: from one neuron to more than fit


def next_sizes(spec: RunSpec, losses: Mapping[Size, float]) -> list[Size]:
    """What to try next, from the spec's own size on; nothing once all neighbours of the best were tried."""
    if not losses:
        return [Size(layers=spec.host.n_layer)]
    lines = neighbours(spec, best_size(losses))
    return next(filter(None, ([size for size in line if size not in losses] for line in lines)), [])


def best_size(losses: Mapping[Size, float]) -> Size:
    """That with the lowest loss; of equal ones the first that was tried."""
    return min(losses, key=losses.__getitem__)


def neighbours(spec: RunSpec, size: Size) -> list[list[Size]]:
    """Along each axis that growing can go: one smaller and one larger, where there is one and the budget holds it."""
    (_, own, _), (layers, width, heads) = Size(layers=1).numbers(spec.host), size.numbers(spec.host)
    units = {blueprint.adds: blueprint.units for blueprint in blueprints_of(spec.growth).values()}
    unit = math.lcm(min(units.get("width", 1), max(1, own // 4)), spec.host.whole)
    widths = {own + unit * round(own * (WIDER**rung - 1) / unit) for rung in range(-RUNGS, RUNGS)}
    beside = [max((w for w in widths if 0 < w < width), default=0), min(w for w in widths if w > width)]
    lines = {
        "layer": [(n, width, heads) for n in (layers - 1, layers + 1) if n <= spec.growth.max_layers],
        "width": [(layers, w, heads) for w in beside],
        "heads": [(layers, width, n) for n in (heads // 2, 2 * heads)],
    }
    reached = (line for axis, line in lines.items() if axis in units)
    found = [[_size(spec, *numbers) for numbers in line if all(numbers)] for line in reached]
    return [[size for size in line if size is not None] for line in found]


def _size(spec: RunSpec, layers: int, width: int, heads: int) -> Size | None:
    _, own, few = Size(layers=1).numbers(spec.host)
    values = {"layers": layers, "width": width if width != own else None, "heads": heads if heads != few else None}
    try:
        found = Size.checked(values, "a size")
        check_budget(found.born(spec))
    except UserError:
        return None
    return found
