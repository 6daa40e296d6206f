"""What a sweep searches for on tuning seeds: learning rates (`--tune-lr`), and the best static size (`--sizes auto`).

Both by coordinates. Rates, for who is not tuned flatters a rival: first where the decay starts, then the rate, a factor
apart, extended at an end that is best until the best lies between two others or `ROUNDS` are done. A growing arm's rate
is a factor on the rates of the static sizes.

Sizes, as wide as what growing can reach: of the best size so far, the neighbours on the first axis that has untried
ones are tried next: a layer more or less, MLPs about 1.5 times as wide or narrow (by whole grafts, or quarters of the
preset's width where these are less), twice or half the heads. It ends where all neighbours of the best were tried, and
none is better.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from esper.pipelines.sweeps.plan import check_budget
from esper.pipelines.sweeps.sizes import Size
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec

DECAYS = (0.2, 0.4, 0.6, 0.8)  # fractions of the budget
FACTOR = 1.5
ROUNDS = 7
DIGITS = 3  # of a rate: it is the same number wherever it is written
WIDER = 1.5
RUNGS = 40  # widths below and above the preset's: from one neuron to more than fit


class Setting(NamedTuple):
    """Of the optimizer."""

    rate: float
    decay_from: float

    def __str__(self) -> str:
        return f"{self.rate:g} until {self.decay_from:.0%}"


Tried = Mapping[Setting, Sequence[float]]  # the final loss on each tuning seed, infinite where a run failed


def next_settings(start: float, decays: Sequence[float], tried: Tried) -> list[Setting]:
    """What to try next, from the rate `start` on; nothing once the best rate lies between two others."""
    if not tried:
        return [_rounded(start, decay) for decay in decays]
    rate, decay = best_setting(tried)
    rates = _rates(tried)
    new = [rates[0] / FACTOR] * (rate == rates[0]) + [rates[-1] * FACTOR] * (rate == rates[-1])
    return [_rounded(rate, decay) for rate in new]


def best_setting(tried: Tried) -> Setting:
    """That with the lowest mean loss; of equal ones the first in order."""
    return min(sorted(tried), key=lambda setting: fmean(tried[setting]))


def bracketed(tried: Tried) -> bool:
    """Whether the best rate lies between two others."""
    return bool(tried) and best_setting(tried).rate not in (_rates(tried)[0], _rates(tried)[-1])


def _rates(tried: Tried) -> list[float]:
    return sorted(setting.rate for setting in tried if setting.decay_from == best_setting(tried).decay_from)


def _rounded(rate: float, decay: float) -> Setting:
    return Setting(float(f"{rate:.{DIGITS}g}"), decay)


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
    from esper.workers.kasmina.registry import blueprints_of  # torch: seconds that a report does not take

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
