"""Fitting loss laws to static runs, so that a controller is trained on laws like those of the text it will meet.

Fitted are E, A, α, B and β of `workers/law.py` to the annealed losses that static sizes end at, by the method of
Hoffmann et al. 2022 (2203.15556, section 3.3): a Huber loss on the logarithm of the loss, the best of a grid of starts.
Here it is scipy's `least_squares`, run until it converges (Besiroglu et al. 2024, 2404.10102: that fit stopped before
it had). What is fitted is the loss that a surrogate run ends at: it starts at ln V, where equation 2 starts at
infinity, and so a few tokens ahead.

Static sizes differ in depth only. With it attention, other parameters and layers grow alike, so that N/N₀ is the number
of layers (but for a final norm's few parameters) whatever each of them counts. How much they count separately cannot be
told from such runs: `heads`, `width` and `layer` keep their wide ranges, and a controller must find out by looking.

A loss counts the less the further it lies above the lowest of all, by half at `NEAR`: a text's loss first falls faster
than any power law, and a controller's choice is between sizes that are good, not between bad ones. Fitted to 8 runs of
500,000 and 1,000,000 parameter-seconds of `tinystories-char` it foretells 9 of 3,000,000 to 0.026 nats with this, and
to 0.038 without, where seeds differ by 0.015; `NEAR` was chosen on these runs, so that on others it may help less.

What the points leave open (with few sizes E, A and α trade against each other) a weak pull of the exponents to 1/2
decides: an exponent that is off by a factor of e costs as much as a point that is off by `TOLERANCE`.
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
from esper.workers.laws.scaling_law import VOCABULARY, Law, Size, start_of

CONSTANTS: tuple[str, ...] = ("floor", "size", "size_exponent", "data", "data_exponent")
BOUNDS: dict[str, Range] = {
    "floor": (0.01, 4.0),
    "size": (0.02, 4.0),
    "size_exponent": (0.05, 2.0),
    "data": (1e-4, 4.0),
    "data_exponent": (0.05, 2.0),
}
"""Within which every law that is drawn lies: growing always helps a little, and nothing falls off a cliff."""
STARTS = (0.25, 0.6, 1.3)  # exponents that the fit sets out from, each with each
TOLERANCE = 0.01  # of a loss's logarithm: about what seeds differ by; what is further off counts linearly
NEAR = 0.2  # nats above the lowest loss at which a loss counts half
SHARE = 0.25  # by which each constant's range surrounds it at least
WIDEST = 2.0  # and the factor by which it does at most
SIZES, APART = 3, 1.2  # sizes that it takes, and the factor between a size's token counts
ROOM = 0.95  # of ln V, for the largest E + A


@dataclass(frozen=True)
class StaticPoint:
    """An annealed loss of a static run: its last, or a cooldown fork's.

    Attributes:
        layers: of the host.
        tokens: trained on until then.
        loss: on validation, nats per token.
        seed: of the run.
    """

    layers: int
    tokens: float
    loss: float
    seed: int


@dataclass(frozen=True)
class LawFit:
    """What was fitted.

    Attributes:
        laws: ranges around the constants; `heads`, `width` and `layer` are the spec's.
        floor: E, nats.
        size: A, nats.
        size_exponent: α.
        data: B, nats, at the tokens that one layer sees in the spec's whole budget.
        data_exponent: β.
        residual: nats, root mean square over the points.
        held_out: nats, root mean square of each seed's last losses against the fit to the other seeds; None where
            without any seed too little is left to fit.
    """

    laws: LawSpec
    floor: float
    size: float
    size_exponent: float
    data: float
    data_exponent: float
    residual: float
    held_out: float | None

    def law(self, spec: RunSpec) -> Law:
        """The fitted law itself; heads, width and layers count as in the middle of their ranges."""
        return Law.drawn(0, spec.model_copy(update={"laws": self.exact()}))

    def exact(self) -> LawSpec:
        """Ranges that only the fitted law is drawn from."""
        middles = {name: math.sqrt(math.prod(getattr(self.laws, name))) for name in ("heads", "width", "layer")}
        constants = {name: getattr(self, name) for name in CONSTANTS}
        return LawSpec.model_validate({name: (value, value) for name, value in {**constants, **middles}.items()})


def points_of(summary: Mapping[str, Any]) -> list[StaticPoint]:
    """The annealed losses in the summary of a static run: of its cooldowns, and its last. None if it diverged."""
    if summary["diverged"]:
        return []
    layers, seed = summary["layers"], summary["seed"]
    ends = [end for end in (*summary["annealed"], summary) if end["val_loss"] is not None]
    return [StaticPoint(layers, end["tokens"], end["val_loss"], seed) for end in ends]


def fit_laws(spec: RunSpec, points: Sequence[StaticPoint]) -> LawFit:
    """Fit a law to static runs on the spec's host, and the ranges around it that controllers are trained on.

    A range reaches as far to both sides as the greater of two: twice the constant's standard error over seeds
    (jackknife: Efron 1982, of refits without one seed), and `SHARE`. Seeds tell what chance does; the share is for what
    they cannot tell: that the law's form is not quite the text's, that a run that grows may not fall as static ones do,
    and how far the pull of the exponents goes wrong. The default ranges of A, α and β are about as wide.

    Args:
        spec: of the runs; `spec.budget` only states what B is measured at, and the points may come from other budgets.
        points: of static runs of `SIZES` sizes or more, each at two token counts or more (cooldowns give them).

    Raises:
        UserError: sizes or token counts are too few, or a loss is none that a surrogate can have.
    """
    missing = lacking(points)
    if missing is not None:
        raise UserError(missing)
    fit = _Fit(spec, points)
    logs = fit.best(np.ones(len(points), bool))
    refits, missed = [], []
    for seed in sorted({point.seed for point in points}):
        if lacking([point for point in points if point.seed != seed]) is None:
            out = np.array([point.seed == seed for point in points])
            refits.append(fit.improved(logs, ~out))
            missed.append(fit.off(refits[-1])[out & fit.last])
    constants = dict(zip(CONSTANTS, map(float, np.exp(logs)), strict=True))
    return LawFit(
        laws=spec.laws.model_copy(update=_ranges(constants, _standard_errors(refits))),
        residual=_rms(fit.off(logs)),
        held_out=_rms(np.concatenate(missed)) if missed else None,
        **constants,
    )


def lacking(points: Sequence[StaticPoint]) -> str | None:
    """Why no law can be fitted to the points, and how to mend it, in a sentence; None if one can."""
    top = math.log(VOCABULARY)
    for point in points:
        if not (0 < point.loss < top and 0 < point.tokens < math.inf):
            return (
                f"a static run of {point.layers} layer(s) has loss {point.loss:.4g} at {point.tokens:.4g} tokens, but "
                f"both must be above 0, and the loss below ln {VOCABULARY} = {top:.2f} nats, where a surrogate starts: "
                "leave this point out."
            )
    tokens: dict[int, list[float]] = {}
    for point in points:
        tokens.setdefault(point.layers, []).append(point.tokens)
    if len(tokens) < SIZES:
        found = ", ".join(map(str, sorted(tokens))) or "none"
        return (
            f"laws are fitted to static runs of {SIZES} sizes or more, but there are only these (layers): {found}: "
            "run static with more numbers of layers."
        )
    for layers, counts in sorted(tokens.items()):
        if max(counts) < APART * min(counts):
            return (
                f"static runs of {layers} layer(s) have losses at only one number of tokens ({max(counts):,.0f}), but "
                "laws are fitted to two or more: run them with cooldowns, --set budget.cooldowns=[0.25,0.5]."
            )
    return None


def predicted(law: Law, spec: RunSpec, points: Sequence[StaticPoint]) -> np.ndarray:
    """The loss that a law gives static runs at the points' layers and tokens, nats, float64 (points,)."""
    return _ended(law, _sizes(spec, points), np.array([point.tokens for point in points]))


def law_distance(law: Law, spec: RunSpec, points: Sequence[StaticPoint]) -> float:
    """How far off a law is at points (say, final losses that it was not fitted to): nats, root mean square."""
    return _rms(predicted(law, spec, points) - [point.loss for point in points])


class _Fit:
    """The points as arrays, and the search. Constants are logarithms, in the order of `CONSTANTS`."""

    def __init__(self, spec: RunSpec, points: Sequence[StaticPoint]) -> None:
        unfitted = dict.fromkeys(CONSTANTS, 1.0)
        self._law = LawFit(spec.laws, **unfitted, residual=0.0, held_out=None).law(spec)
        self._sizes, self._tokens = _sizes(spec, points), np.array([float(point.tokens) for point in points])
        self._losses = np.array([point.loss for point in points])
        self._weights = 1 / (1 + (self._losses - self._losses.min()) / NEAR)
        self._bounds = np.log(np.array([BOUNDS[name] for name in CONSTANTS]).T)
        layers = self._sizes.layers
        most = {each: self._tokens[layers == each].max() for each in np.unique(layers)}
        self.last = self._tokens * APART > np.array([most[each] for each in layers])
        """Points at their size's largest token count, bool (points,)."""

    def off(self, logs: np.ndarray) -> np.ndarray:
        """Predicted less measured, nats, float64 (points,)."""
        return _ended(self._of(logs), self._sizes, self._tokens) - self._losses

    def best(self, of: np.ndarray) -> np.ndarray:
        """The best constants for some of the points (bool), from all starts."""
        starts = (self._start(alpha, beta, of) for alpha, beta in product(STARTS, STARTS))
        found = [self._search(start, of) for start in starts]
        return min(found, key=lambda result: result.cost).x

    def improved(self, logs: np.ndarray, of: np.ndarray) -> np.ndarray:
        """The best constants for some of the points that are found from these."""
        return self._search(logs, of).x

    def _of(self, logs: np.ndarray) -> Law:
        return replace(self._law, **dict(zip(CONSTANTS, map(float, np.exp(logs)), strict=True)))

    def _start(self, alpha: float, beta: float, of: np.ndarray) -> np.ndarray:
        """With these exponents, and the E, A and B that equation 2, linear in them, fits best."""
        one = replace(self._of(np.zeros(len(CONSTANTS))), floor=0.0, size_exponent=alpha)
        columns = [np.ones(len(self._losses)), one.size_loss(self._sizes), (self._tokens / one.tokens) ** -beta]
        floor, size, data = nnls(np.stack(columns, axis=1)[of], self._losses[of])[0]
        logs = np.log(np.maximum([floor, size, alpha, data, beta], 1e-9))
        inside = self._bounds + 1e-3 * np.array([[1], [-1]])
        return np.clip(logs, *inside)

    def _search(self, start: np.ndarray, of: np.ndarray) -> Any:
        def residuals(logs: np.ndarray) -> np.ndarray:
            law = self._of(logs)
            if law.floor + law.size >= ROOM * math.log(VOCABULARY):
                return np.full(of.sum() + 2, 10.0)
            ends = _ended(law, self._sizes, self._tokens)
            pull = TOLERANCE * np.log([2 * law.size_exponent, 2 * law.data_exponent])
            return np.append((self._weights * np.log(ends / self._losses))[of], pull)

        return least_squares(
            residuals, start, bounds=tuple(self._bounds), loss="huber", f_scale=TOLERANCE, max_nfev=500
        )


def _sizes(spec: RunSpec, points: Sequence[StaticPoint]) -> Size:
    sizes = {layers: Size.of(start_of(spec, layers)) for layers in {point.layers for point in points}}
    names = ("attention", "other", "layers")
    return Size(*(np.array([getattr(sizes[point.layers], name) for point in points], float) for name in names))


def _ended(law: Law, size: Size, tokens: np.ndarray) -> np.ndarray:
    """What a surrogate run ends at that stays at a size."""
    return law.trained(math.log(VOCABULARY), law.size_loss(size), tokens)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _standard_errors(refits: Sequence[np.ndarray]) -> np.ndarray:
    """Of the constants' logarithms, by jackknife: float64 (constants,); 0 without refits."""
    n = len(refits)
    if n < 2:
        return np.zeros(len(CONSTANTS))
    return np.sqrt((n - 1) * np.var(refits, axis=0))


def _ranges(constants: Mapping[str, float], errors: np.ndarray) -> dict[str, Range]:
    """Each constant's, within its bounds, and E + A at most `ROOM` of what a surrogate starts at."""
    ranges = {}
    for (name, value), error in zip(constants.items(), errors, strict=True):
        factor = min(WIDEST, max(1 + SHARE, math.exp(2 * error)))
        low, high = BOUNDS[name]
        ranges[name] = max(low, value / factor), min(high, value * factor)
    level, top = constants["floor"] + constants["size"], ranges["floor"][1] + ranges["size"][1]
    kept = min(1.0, (ROOM * math.log(VOCABULARY) - level) / (top - level))
    for name in ("floor", "size"):
        low, high = ranges[name]
        ranges[name] = low, constants[name] + kept * (high - constants[name])
    return ranges
