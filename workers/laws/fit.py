"""Fits the scaling law (`scaling_law.py`) to annealed losses of static runs, for controllers that meet that text.

E, A, α, B and β by Hoffmann et al. 2022 (2203.15556, section 3.3): a Huber loss on the log loss, the best of a grid of
starts. Static sizes differ in depth only, so `heads`, `width` and `layer` keep their ranges.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from esper.platform.errors import UserError
from esper.platform.spec import LawSpec, Range, RunSpec
from esper.workers.laws.scaling_law import VOCABULARY, ScalingLaw, size_of
from esper.workers.tolaria.hosts import start_shape

BOUNDS: dict[str, Range] = {  # of the fitted constants: growing always helps a little
    "floor": (0.01, 4.0),
    "size": (0.02, 4.0),
    "size_exponent": (0.05, 2.0),
    "data": (1e-4, 4.0),
    "data_exponent": (0.05, 2.0),
}
STARTS = (0.25, 0.6, 1.3)  # exponents at which fits start, in all pairs
TOLERANCE = 0.01  # Huber threshold on the log loss, about the spread of seeds
# Nats above the lowest loss that halve a loss's weight: early losses fall faster than a power law. 8 short runs of
# `tinystories-char` predict 9 long ones to 0.026 nats, unweighted to 0.038; seeds differ by 0.015.
NEAR = 0.2
SHARE, WIDEST = 0.25, 2.0  # a constant's range: at least this share and at most this factor to each side
SIZES, APART = 3, 1.2  # least number of sizes, and least ratio of a size's token counts
START = math.log(VOCABULARY)  # a surrogate's first loss, nats
ROOM = 0.95  # of that, for the largest E + A


class StaticPoint(NamedTuple):
    """An annealed loss of a static run: its last, or a cooldown fork's."""

    layers: int
    tokens: float  # trained on until then
    loss: float  # on validation, nats per token
    seed: int


class LawFit(NamedTuple):
    """What was fitted."""

    law: ScalingLaw  # heads, width and layer: geometric middles of their ranges
    laws: LawSpec  # ranges around its constants
    residual: float  # nats, root mean square over the points


def points_of(summary: Mapping[str, Any]) -> list[StaticPoint]:
    """The annealed losses (cooldowns and last) in a static run's summary; empty if it diverged."""
    found = (
        [] if summary["diverged"] else [end for end in (*summary["annealed"], summary) if end["val_loss"] is not None]
    )
    return [StaticPoint(summary["layers"], end["tokens"], end["val_loss"], summary["seed"]) for end in found]


def fit_laws(spec: RunSpec, points: Sequence[StaticPoint]) -> LawFit:
    """Fit a law to static runs of the spec's host, from any budget, and the ranges to train controllers on.

    A range reaches two standard errors over seeds (jackknife: Efron 1982) to each side, and at least `SHARE`, for the
    misfit of the law's form. UserError for too few sizes or token counts, or losses outside (0, ln V).
    """
    if not _enough(points):
        sizes = ", ".join(map(str, sorted({point.layers for point in points}))) or "none"
        raise UserError(
            f"laws are fitted to {SIZES} sizes or more, with losses below {START:.2f} nats at two token counts each, "
            f"and the sizes here are (layers): {sizes}: run more, with --set budget.cooldowns=[0.25,0.5]."
        )
    middles = {name: math.sqrt(math.prod(getattr(spec.laws, name))) for name in ("heads", "width", "layer")}
    fixed = {name: (value, value) for name, value in (dict.fromkeys(BOUNDS, 1.0) | middles).items()}
    unfitted = ScalingLaw.drawn(0, spec.model_copy(update={"laws": LawSpec.model_validate(fixed)}))
    size, tokens = _places(spec, points)
    losses, seeds = (np.array([getattr(point, name) for point in points]) for name in ("loss", "seed"))
    weights = 1 / (1 + (losses - losses.min()) / NEAR)
    bounds = np.log(np.array(list(BOUNDS.values())).T)

    def with_constants(logs: np.ndarray) -> ScalingLaw:
        return replace(unfitted, **dict(zip(BOUNDS, np.exp(logs).tolist(), strict=True)))

    def start(alpha: float, beta: float) -> np.ndarray:
        """Log constants at these exponents, with the best E, A and B: equation 2 is linear in them."""
        size_part = replace(unfitted, floor=0.0, size_exponent=alpha).size_loss(size)
        columns = [np.ones(len(points)), size_part, (tokens / unfitted.tokens) ** -beta]
        floor, scale, data = nnls(np.stack(columns, axis=1), losses)[0]
        return np.clip(np.log(np.maximum([floor, scale, alpha, data, beta], 1e-9)), bounds[0] + 1e-3, bounds[1] - 1e-3)

    def residuals(logs: np.ndarray, kept: np.ndarray) -> np.ndarray:
        law = with_constants(logs)
        if law.floor + law.size >= ROOM * START:
            return np.full(kept.sum() + 2, 10.0)
        ends = law.trained(START, law.size_loss(size), tokens)
        pull = TOLERANCE * np.log([2 * law.size_exponent, 2 * law.data_exponent])  # weak, to exponents of 1/2
        return np.append((weights * np.log(ends / losses))[kept], pull)

    def search(begin: np.ndarray, kept: np.ndarray) -> Any:
        robust: Any = {"loss": "huber", "f_scale": TOLERANCE, "max_nfev": 500}
        return least_squares(residuals, begin, bounds=tuple(bounds), args=(kept,), **robust)

    found = [search(start(alpha, beta), seeds == seeds) for alpha, beta in product(STARTS, STARTS)]
    best = min(found, key=lambda result: result.cost).x
    others = [seed for seed in sorted(set(seeds)) if _enough([point for point in points if point.seed != seed])]
    refits = [search(best, seeds != seed).x for seed in others]
    errors = np.sqrt((len(refits) - 1) * np.var(refits, axis=0)) if len(refits) > 1 else np.zeros(len(BOUNDS))
    law = with_constants(best)
    residual = float(np.sqrt(np.mean(np.square(predicted(law, spec, points) - losses))))
    return LawFit(law, spec.laws.model_copy(update=_ranges(law, errors)), residual)


def _enough(points: Sequence[StaticPoint]) -> bool:
    tokens: dict[int, list[float]] = {}
    for point in points:
        tokens.setdefault(point.layers, []).append(point.tokens)
    possible = all(0 < point.loss < START and 0 < point.tokens < math.inf for point in points)
    return possible and len(tokens) >= SIZES and all(max(each) >= APART * min(each) for each in tokens.values())


def predicted(law: ScalingLaw, spec: RunSpec, points: Sequence[StaticPoint]) -> np.ndarray:
    """The law's losses at the points' layers and tokens, nats, float64 (points,)."""
    size, tokens = _places(spec, points)
    return law.trained(START, law.size_loss(size), tokens)


def _places(spec: RunSpec, points: Sequence[StaticPoint]) -> tuple[np.ndarray, np.ndarray]:
    """By `size_of`, float64 (3, points), and tokens, float64 (points,)."""
    shapes = [start_shape(spec, VOCABULARY, point.layers) for point in points]
    return size_of(*shapes), np.array([point.tokens for point in points], float)


def _ranges(law: ScalingLaw, errors: np.ndarray) -> dict[str, Range]:
    """Each constant's range within its bounds, with E + A at most `ROOM` of `START`."""
    ranges = {}
    for (name, (lowest, highest)), error in zip(BOUNDS.items(), errors, strict=True):
        value, factor = getattr(law, name), min(WIDEST, max(1 + SHARE, math.exp(2 * error)))
        ranges[name] = max(lowest, value / factor), min(highest, value * factor)
    level, top = law.floor + law.size, ranges["floor"][1] + ranges["size"][1]
    kept = min(1.0, (ROOM * START - level) / (top - level))
    for name, value in (("floor", law.floor), ("size", law.size)):
        ranges[name] = ranges[name][0], value + kept * (ranges[name][1] - value)
    return ranges
