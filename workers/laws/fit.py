"""Fitting scaling laws to static runs, so that a controller is trained on laws like those of the text it will meet.

E, A, α, B and β of `scaling_law.py` are fitted to the annealed losses that static sizes end at, by the method of
Hoffmann et al. 2022 (2203.15556, section 3.3): a Huber loss on the logarithm of the loss, the best of a grid of starts.
Static sizes differ in depth only, and tell nothing of `heads`, `width` and `layer`, which keep their wide ranges.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from esper.platform.errors import UserError
from esper.platform.spec import LawSpec, Range, RunSpec
from esper.workers.laws.scaling_law import VOCABULARY, ScalingLaw, Size, start_of

BOUNDS: dict[str, Range] = {
    "floor": (0.01, 4.0),
    "size": (0.02, 4.0),
    "size_exponent": (0.05, 2.0),
    "data": (1e-4, 4.0),
    "data_exponent": (0.05, 2.0),
}
"""What is fitted, and within which bounds: growing always helps a little, and nothing falls off a cliff."""
STARTS = (0.25, 0.6, 1.3)  # exponents that the fit sets out from, each with each
TOLERANCE = 0.01  # of a loss's logarithm: about what seeds differ by; what is further off counts linearly
# Nats above the lowest loss at which a loss counts half: a text's loss first falls faster than any power law. With it 8
# short runs of `tinystories-char` foretell 9 long ones to 0.026 nats, without to 0.038; seeds differ by 0.015.
NEAR = 0.2
SHARE, WIDEST = 0.25, 2.0  # by which each constant's range surrounds it at least, and the factor at most
SIZES, APART = 3, 1.2  # sizes that it takes, and the factor between a size's token counts
START = math.log(VOCABULARY)  # nats, where a surrogate starts
ROOM = 0.95  # of that, for the largest E + A


@dataclass(frozen=True)
class StaticPoint:
    """An annealed loss of a static run: its last, or a cooldown fork's."""

    layers: int
    tokens: float  # trained on until then
    loss: float  # on validation, nats per token
    seed: int


@dataclass(frozen=True)
class LawFit:
    """What was fitted."""

    law: ScalingLaw  # heads, width and layers count as in the middle of their ranges
    laws: LawSpec  # ranges around its constants
    residual: float  # nats, root mean square over the points


def points_of(summary: Mapping[str, Any]) -> list[StaticPoint]:
    """The annealed losses in the summary of a static run: of its cooldowns, and its last. None if it diverged."""
    ends = [] if summary["diverged"] else [*summary["annealed"], summary]
    return [
        StaticPoint(summary["layers"], end["tokens"], end["val_loss"], summary["seed"])
        for end in ends
        if end["val_loss"] is not None
    ]


def fit_laws(spec: RunSpec, points: Sequence[StaticPoint]) -> LawFit:
    """Fit a law to static runs on the spec's host, and the ranges around it that controllers are trained on.

    A range reaches as far to both sides as the greater of two: twice the constant's standard error over seeds
    (jackknife: Efron 1982, of refits without one seed), and `SHARE`, for what seeds cannot tell: that the law's form is
    not quite the text's. `spec.budget` only states what B is measured at: the points may come from other budgets.

    Raises:
        UserError: sizes or token counts are too few, or a loss is none that a surrogate can have.
    """
    if not _enough(points):
        sizes = ", ".join(map(str, sorted({point.layers for point in points}))) or "none"
        raise UserError(
            f"laws are fitted to static runs of {SIZES} sizes or more, each with losses of 0 to {START:.2f} nats at "
            f"two numbers of tokens or more, and the sizes here are (layers): {sizes}: run static with more sizes, "
            "and with cooldowns, --set budget.cooldowns=[0.25,0.5]."
        )
    middles = {name: math.sqrt(math.prod(getattr(spec.laws, name))) for name in ("heads", "width", "layer")}
    fixed = {name: (value, value) for name, value in (dict.fromkeys(BOUNDS, 1.0) | middles).items()}
    unfitted = ScalingLaw.drawn(0, spec.model_copy(update={"laws": LawSpec.model_validate(fixed)}))
    size, tokens, losses = _arrays(spec, points)
    weights = 1 / (1 + (losses - losses.min()) / NEAR)
    bounds = np.log(np.array(list(BOUNDS.values())).T)

    def with_constants(logs: np.ndarray) -> ScalingLaw:
        return replace(unfitted, **dict(zip(BOUNDS, map(float, np.exp(logs)), strict=True)))

    def start(alpha: float, beta: float) -> np.ndarray:
        """With these exponents, and the E, A and B that equation 2, linear in them, fits best."""
        size_part = replace(unfitted, floor=0.0, size_exponent=alpha).size_loss(size)
        columns = [np.ones(len(points)), size_part, (tokens / unfitted.tokens) ** -beta]
        floor, scale, data = nnls(np.stack(columns, axis=1), losses)[0]
        return np.clip(np.log(np.maximum([floor, scale, alpha, data, beta], 1e-9)), bounds[0] + 1e-3, bounds[1] - 1e-3)

    def search(begin: np.ndarray, kept: np.ndarray) -> Any:
        """The best constants' logarithms for some of the points (bool) that are found from a start."""

        def residuals(logs: np.ndarray) -> np.ndarray:
            law = with_constants(logs)
            if law.floor + law.size >= ROOM * START:
                return np.full(kept.sum() + 2, 10.0)
            ends = law.trained(START, law.size_loss(size), tokens)
            pull = TOLERANCE * np.log([2 * law.size_exponent, 2 * law.data_exponent])  # weak, to exponents of 1/2
            return np.append((weights * np.log(ends / losses))[kept], pull)

        return least_squares(residuals, begin, bounds=tuple(bounds), loss="huber", f_scale=TOLERANCE, max_nfev=500)

    everything = np.ones(len(points), bool)
    found = [search(start(alpha, beta), everything) for alpha, beta in product(STARTS, STARTS)]
    best = min(found, key=lambda result: result.cost).x
    without = [[point.seed != seed for point in points] for seed in sorted({point.seed for point in points})]
    enough = [kept for kept in without if _enough([point for point, keep in zip(points, kept, strict=True) if keep])]
    refits = [search(best, np.array(kept)).x for kept in enough]
    errors = np.sqrt((len(refits) - 1) * np.var(refits, axis=0)) if len(refits) > 1 else np.zeros(len(BOUNDS))
    law = with_constants(best)
    return LawFit(law, spec.laws.model_copy(update=_ranges(law, errors)), law_distance(law, spec, points))


def _enough(points: Sequence[StaticPoint]) -> bool:
    tokens: dict[int, list[float]] = {}
    for point in points:
        tokens.setdefault(point.layers, []).append(point.tokens)
    possible = all(0 < point.loss < START and 0 < point.tokens < math.inf for point in points)
    return possible and len(tokens) >= SIZES and all(max(each) >= APART * min(each) for each in tokens.values())


def predicted(law: ScalingLaw, spec: RunSpec, points: Sequence[StaticPoint]) -> np.ndarray:
    """The loss that a law gives static runs at the points' layers and tokens, nats, float64 (points,)."""
    size, tokens, _ = _arrays(spec, points)
    return law.trained(START, law.size_loss(size), tokens)


def law_distance(law: ScalingLaw, spec: RunSpec, points: Sequence[StaticPoint]) -> float:
    """How far off a law is at points: nats, root mean square."""
    return float(np.sqrt(np.mean(np.square(predicted(law, spec, points) - [point.loss for point in points]))))


def _arrays(spec: RunSpec, points: Sequence[StaticPoint]) -> tuple[Size, np.ndarray, np.ndarray]:
    """Sizes, tokens and losses, each float64 (points,)."""
    size = Size.of_all(start_of(spec, point.layers) for point in points)
    return size, np.array([float(point.tokens) for point in points]), np.array([point.loss for point in points])


def _ranges(law: ScalingLaw, errors: np.ndarray) -> dict[str, Range]:
    """Each constant's, within its bounds, and E + A at most `ROOM` of what a surrogate starts at."""
    ranges = {}
    for (name, (lowest, highest)), error in zip(BOUNDS.items(), errors, strict=True):
        value, factor = getattr(law, name), min(WIDEST, max(1 + SHARE, math.exp(2 * error)))
        ranges[name] = max(lowest, value / factor), min(highest, value * factor)
    level, top = law.floor + law.size, ranges["floor"][1] + ranges["size"][1]
    kept = min(1.0, (ROOM * START - level) / (top - level))
    for name in ("floor", "size"):
        value = getattr(law, name)
        ranges[name] = ranges[name][0], value + kept * (ranges[name][1] - value)
    return ranges
