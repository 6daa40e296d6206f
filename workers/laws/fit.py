"""Fits scaling laws (`scaling_law.py`) to annealed losses of static and growing runs: one law, and an ensemble.

E, A, α, B and β by Hoffmann et al. 2022 (2203.15556, section 3.3): a Huber loss on the log loss, the best of a grid of
starts. Static sizes that differ in depth say nothing of `heads`, `width` and `layer`: growing runs do, whose loss is
followed from size to size. An ensemble's member is fitted under random weights of the runs (the Bayesian bootstrap,
Rubin 1981) and pulled to a prior's random draw (randomize-then-optimize, Bardsley et al. 2014): what runs say nothing
of keeps the prior's spread.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.seeding import stream
from esper.platform.spec import LawSpec, Range, RunSpec
from esper.workers.laws.forecast import ensemble, member_losses, steady
from esper.workers.laws.scaling_law import VOCABULARY, ScalingLaw, size_at, size_of
from esper.workers.tolaria.hosts import start_shape

BOUNDS: dict[str, Range] = {  # of the fitted constants: growing always helps a little
    "floor": (0.01, 4.0),
    "size": (0.02, 4.0),
    "size_exponent": (0.05, 2.0),
    "data": (1e-4, 4.0),
    "data_exponent": (0.05, 2.0),
}
WEIGHTS = ("heads", "width", "layer")  # fitted within the spec's ranges
DEPTH: dict[str, Range] = {"depth": (1e-3, 1.0), "slowness": (1e-3, 1.2)}  # what layers do beside, within these;
NO_DEPTH: dict[str, Range] = dict.fromkeys(DEPTH, (1e-9, 1e-9))  # by static runs alone it looks like an exponent
EXPERT: dict[str, Range] = {"expert": (0.02, 2.0)}  # where runs have any
STARTS = (0.25, 0.6, 1.3)  # exponents at which fits start, in all pairs
TOLERANCE = 0.01  # Huber threshold on the log loss, about the spread of seeds
# Nats above the lowest loss that halve a loss's weight: early losses fall faster than a power law. 8 short runs of
# `tinystories-char` predict 9 long ones to 0.026 nats, unweighted to 0.038; seeds differ by 0.015.
NEAR = 0.2
SHARE, WIDEST = 0.25, 2.0  # a constant's range: at least this share and at most this factor to each side
SIZES, APART = 3, 1.2  # least number of sizes of several token counts, and least ratio of these
START = math.log(VOCABULARY)  # a surrogate's first loss, nats
ROOM = 0.95  # of that, for the largest E + A
MEMBERS = 32  # of an ensemble
NUDGE = 1.5e-8  # of a log constant, for the slope there


class Annealed(NamedTuple):
    """A loss that a run's rate was let down for: its last, or a cooldown fork's."""

    sizes: np.ndarray  # by `SIZE`, of each stage, float64 (S, 4)
    tokens: np.ndarray  # trained on in each stage, float64 (S,)
    loss: float  # on validation, nats per token
    seed: int


class LawFit(NamedTuple):
    """What was fitted."""

    law: ScalingLaw
    laws: LawSpec  # ranges around its constants
    ensemble: list[ScalingLaw]
    residual: float  # nats, root mean square over the losses


def annealed_losses(summary: Mapping[str, Any]) -> list[Annealed]:
    """Those of a run, by its summary; none where it diverged or was rolled back."""
    curve, found = summary["val_curve"], []
    if summary["diverged"] or summary["rollbacks"]:
        return found
    for fork in summary["annealed"]:
        same = [i for i, p in enumerate(curve) if size_at(p) == size_at(fork) and p["tokens"] <= fork["tokens"]]
        if same and fork["val_loss"] is not None:  # what the run did after the fork began is another size
            found.append(Annealed(*stages([*curve[: same[-1] + 1], fork]), fork["val_loss"], summary["seed"]))
    return [*found, Annealed(*stages(curve), summary["val_loss"], summary["seed"])]


def stages(curve: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Of a run's curve: sizes, float64 (S, 4), and tokens, float64 (S,)."""
    sizes, tokens = [size_at(curve[0])], [0]
    for before, point in pairwise(curve):
        if size_at(before) != size_at(point):
            sizes.append(size_at(point))
            tokens.append(0)
        tokens[-1] += point["tokens"] - before["tokens"]
    return np.array(sizes, float), np.array(tokens, float)


def fitted(folder: Path, found: Sequence[tuple[RunSpec, str, Mapping[str, Any]]]) -> tuple[FittedLaws, ScalingLaw]:
    """Laws fitted to runs in a folder (spec, fingerprint of the text, summary), and the middle one.

    UserError where they are of several presets, tokenizers or texts, or as for `fit_laws`.
    """
    for what, values in (
        ("preset", {spec.preset for spec, _, _ in found}),
        ("tokenizer", {spec.data.encoding for spec, _, _ in found}),
        ("text", {text for _, text, _ in found}),
    ):
        if len(values) != 1:
            told = f"several: {', '.join(sorted(values))}" if values else "none"
            raise UserError(f"laws are of one {what}, and the runs in {folder} are of {told}: name others.")
    used = [(spec, summary, own) for spec, _, summary in found if (own := annealed_losses(summary))]
    (spec, text, _), losses = found[0], [own for *_, own in used]
    made = fit_laws(spec, losses)
    laws = FittedLaws(
        preset=spec.preset,
        tokenizer=spec.data.encoding,
        host=spec.host.starting_with(1),
        text=text,
        folder=str(folder.absolute()),
        runs=len(used),
        grown=sum(bool(summary["grafts"]) for _, summary, _ in used),
        losses=sum(map(len, losses)),
        command=" ".join(sys.argv),
        residual=made.residual,
        ensemble=ensemble(made.ensemble),
        **decision_losses(made.law, [(spec, summary) for spec, summary, _ in used]),
    )
    return laws, made.law


def fit_laws(spec: RunSpec, runs: Sequence[Sequence[Annealed]], members: int = MEMBERS) -> LawFit:
    """Fit laws to the losses of each run, of the spec's host and any budget; ranges are to train controllers on.

    A range reaches two of the ensemble's standard deviations to each side, and at least `SHARE`, for the misfit of the
    law's form. UserError for too few sizes or token counts, or losses outside (0, ln V).
    """
    points = [point for run in runs for point in run]
    if not _enough(points):
        sizes = ", ".join(map(str, sorted({int(point.sizes[-1, 2]) for point in points}))) or "none"
        raise UserError(
            f"laws are fitted to {SIZES} sizes or more, with losses below {START:.2f} nats at two token counts each, "
            f"and the sizes here are (layers): {sizes}: run more, with --set budget.cooldowns=[0.25,0.5]."
        )
    grew = any(len(point.tokens) > 1 for point in points)
    gated = any(point.sizes[:, 3].any() for point in points)
    ranges = {name: getattr(spec.laws, name) for name in WEIGHTS} | (DEPTH if grew else NO_DEPTH)
    ranges |= EXPERT if gated else {"expert": (1.0, 1.0)}
    middles = {name: math.sqrt(low * high) for name, (low, high) in ranges.items()}
    fixed = {name: (value, value) for name, value in (dict.fromkeys(BOUNDS, 1.0) | middles).items()}
    unfitted = ScalingLaw.drawn(0, spec.model_copy(update={"laws": LawSpec.model_validate(fixed)}))
    one = size_of(start_shape(spec, VOCABULARY, 1))[:, 0]
    sizes, tokens = _padded(points)
    losses = np.array([point.loss for point in points])
    near = 1 / (1 + (losses - losses.min()) / NEAR)
    bounds = np.log(np.array([*BOUNDS.values(), *ranges.values()]).T)
    spread = np.maximum(1e-9, (bounds[1] - bounds[0])[-len(ranges) :] / math.sqrt(12))  # of the prior's logarithms
    bounds += 1e-9 * np.array([[-1], [1]])  # a range may be a point

    def with_constants(values: Any) -> ScalingLaw:
        constants = dict(zip((*BOUNDS, *ranges), values, strict=True))
        law = replace(unfitted, **{**constants, "layer": constants["layer"] * float(one[:2].sum())})
        return replace(law, reference=law.effective(one))

    def start(alpha: float, beta: float) -> np.ndarray:
        """Log constants at these exponents, with the best E, A and B: equation 2 is linear in them."""
        size_part = replace(unfitted, floor=0.0, size_exponent=alpha).size_loss(sizes[-1])
        columns = [np.ones(len(points)), size_part, (tokens.sum(axis=0) / unfitted.tokens) ** -beta]
        floor, scale, data = nnls(np.stack(columns, axis=1), losses)[0]
        logs = np.log(np.maximum([floor, scale, alpha, data, beta, *middles.values()], 1e-9))
        inside = np.minimum(1e-3, (bounds[1] - bounds[0]) / 2)
        return np.clip(logs, bounds[0] + inside, bounds[1] - inside)

    def residuals(logs: np.ndarray, weights: np.ndarray, prior: np.ndarray) -> np.ndarray:
        law = with_constants(np.exp(logs).T[..., None])  # of logs (n,) or, all at once, (k, n)
        with np.errstate(invalid="ignore"):
            ends = law.followed(sizes, tokens)[-1]
        own = logs[..., [2, 4, *range(len(BOUNDS), logs.shape[-1])]]  # a weak pull: of exponents to 1/2
        pull = TOLERANCE * (own - prior) / [1, 1, *spread]
        found = np.concatenate([weights * near * np.log(ends / losses), pull], axis=-1)
        return np.where(law.floor + law.size < ROOM * START, found, 10.0)

    def jacobian(logs: np.ndarray, *weighted: np.ndarray) -> np.ndarray:
        steps = NUDGE * np.maximum(1, np.abs(logs))
        near_by = logs + np.diag(np.where(logs + steps > bounds[1], -steps, steps))
        at, *moved = residuals(np.stack([logs, *near_by]), *weighted)
        return ((np.array(moved) - at) / (near_by - logs).diagonal()[:, None]).T

    def search(begin: np.ndarray, weights: np.ndarray, prior: np.ndarray) -> Any:
        robust: Any = {"jac": jacobian, "loss": "huber", "f_scale": TOLERANCE, "max_nfev": 500, "x_scale": 1.0}
        return least_squares(residuals, begin, bounds=tuple(bounds), args=(weights, prior), **robust)

    middle = np.log([0.5, 0.5, *middles.values()])
    found = [search(start(*exponents), np.ones(len(points)), middle) for exponents in product(STARTS, STARTS)]
    best = min(found, key=lambda result: result.cost).x
    random, fitted = stream(0, "ensemble"), []
    for _ in range(members):
        weights = np.repeat(np.sqrt(random.exponential(size=len(runs))), [len(run) for run in runs])
        prior = np.append(middle[:2] + random.standard_normal(2), random.uniform(*bounds[:, -len(ranges) :]))
        fitted.append(search(np.append(best[: len(BOUNDS)], prior[2:]), weights, prior).x)
    law = with_constants(np.exp(best).tolist())
    residual = float(np.sqrt(np.mean(np.square(law.followed(sizes, tokens)[-1] - losses))))
    errors = np.std(fitted, axis=0) if fitted else np.zeros(len(best))
    laws = _ranges(law, errors, BOUNDS | (DEPTH if grew else {}) | (EXPERT if gated else {}))
    drawn = [with_constants(np.exp(each).tolist()) for each in fitted]
    return LawFit(law, spec.laws.model_copy(update=laws), drawn, residual)


def held_out_residual(spec: RunSpec, runs: Sequence[Sequence[Annealed]]) -> float | None:
    """Root mean square, nats, over growing runs, each by a law fitted without those of its seed; None without any."""
    growing = [run for run in runs if any(len(point.tokens) > 1 for point in run)]
    misses = []
    for seed in sorted({run[0].seed for run in growing}):
        left_out = [run for run in growing if run[0].seed == seed]
        law = fit_laws(spec, [run for run in runs if not any(run is other for other in left_out)], 0).law
        misses += [predicted(law, run) - [point.loss for point in run] for run in left_out]
    return float(np.sqrt(np.mean(np.square(np.concatenate(misses))))) if misses else None


def decision_losses(law: ScalingLaw, runs: Sequence[tuple[RunSpec, Mapping[str, Any]]]) -> dict[str, Any]:
    """How a run's losses before the rate decays follow from the law's: `offset` to `vocab_size` of `FittedLaws`."""
    seen, told, used, fractions = [], [], [], []
    for spec, summary in runs:
        curve = summary["val_curve"]
        seen.append(np.array([point["val_loss"] for point in curve]))
        told.append(member_losses(curve, law)[:, 0])
        fractions.append(np.array([point["budget_fraction"] for point in curve]))
        used.append(np.append(steady(spec, fractions[-1][:-1], seen[-1][:-1]), False))  # the last loss is another
    pairs = [np.stack([own, losses])[:, there] for own, losses, there in zip(told, seen, used, strict=True)]
    by_law, by_run = np.concatenate(pairs, axis=1)
    if len(by_law) < 2:
        what = "loss laws need decisions between the warm-up and the decay of the rate, and these runs have none"
        raise UserError(f"{what}: fit runs of more decisions, or of a later decay.")
    factor, offset = np.polyfit(by_law, by_run, 1).tolist()
    factor, errors = max(0.1, factor), []
    shown = [losses - offset - factor * own for own, losses in zip(told, seen, strict=True)]
    for (spec, summary), own, at in zip(runs, shown, fractions, strict=True):
        evenly = np.interp(np.linspace(0, 1, spec.budget.decisions + 1), at, own)
        errors.append((summary["val_curve"][1]["tokens"], evenly.round(5).tolist()))
    steady_ones = [each[there] for each, there in zip(shown, used, strict=True) if there.any()]
    noise = np.sqrt(np.mean([each.var() for each in steady_ones]))
    misfit = np.std([each.mean() for each in steady_ones])
    one, two = (start_shape(runs[0][0], vocabulary).parameters_count() for vocabulary in (1, 2))
    return {
        "offset": offset,
        "factor": factor,
        "noise": max(1e-3, noise),  # computed runs have next to none
        "misfit": max(1e-3, misfit),
        "errors": errors,
        "vocab_size": 1 + (runs[0][1]["val_curve"][0]["parameters"] - one) // (two - one),
    }


def _enough(points: Sequence[Annealed]) -> bool:
    """Whether static ones of them have enough sizes of two token counts or more."""
    tokens: dict[tuple[float, ...], list[float]] = {}
    for point in points:
        if len(point.tokens) == 1:
            tokens.setdefault(tuple(point.sizes[0]), []).append(point.tokens[0])
    possible = all(0 < point.loss < START and 0 < point.tokens.sum() < math.inf for point in points)
    return possible and sum(max(each) >= APART * min(each) for each in tokens.values()) >= SIZES


def predicted(law: ScalingLaw, points: Sequence[Annealed]) -> np.ndarray:
    """The law's losses at the points, nats, float64 (points,)."""
    return law.followed(*_padded(points))[-1]


def _padded(points: Sequence[Annealed]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes, float64 (S, 4, points), and tokens, float64 (S, points): short ones end with stages of no tokens."""
    most = max(len(point.tokens) for point in points)
    sizes = [np.pad(point.sizes, ((0, most - len(point.tokens)), (0, 0)), mode="edge") for point in points]
    return np.stack(sizes, -1), np.stack([np.pad(p.tokens, (0, most - len(p.tokens))) for p in points], -1)


def _ranges(law: ScalingLaw, errors: np.ndarray, bounds: Mapping[str, Range]) -> dict[str, Range]:
    """Each constant's range within its bounds, with E + A at most `ROOM` of `START`."""
    ranges = {}
    of = dict(zip((*BOUNDS, *WEIGHTS, *DEPTH, *EXPERT), errors, strict=True))
    for name, (lowest, highest) in bounds.items():
        value, factor = getattr(law, name), min(WIDEST, max(1 + SHARE, math.exp(2 * of[name])))
        ranges[name] = max(lowest, value / factor), min(highest, value * factor)
    level, top = law.floor + law.size, ranges["floor"][1] + ranges["size"][1]
    kept = min(1.0, (ROOM * START - level) / (top - level))
    for name, value in (("floor", law.floor), ("size", law.size)):
        ranges[name] = ranges[name][0], value + kept * (ranges[name][1] - value)
    return ranges
