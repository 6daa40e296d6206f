"""What a run may still reach: an ensemble of scaling laws, weighted by the run's losses so far, and planned with.

Open-loop feedback control (Bertsekas 2005, "Dynamic Programming and Optimal Control", chapter 6): the best plan of each
member, by dynamic programming (`oracle.py`), is followed under all members, and a row is worth the lowest weighted mean
of the plans that begin with it. To average the members' own optima instead (QMDP, Littman et al. 1995) supposes that
the truth is known from the next decision on, and so puts grafts off.
"""

from typing import Any

import numpy as np

from esper.platform.errors import UserError
from esper.platform.law_file import CONSTANTS, FIT, FittedLaws
from esper.platform.spec import RunSpec
from esper.workers.laws.oracle import best_plans, course_from, followed
from esper.workers.laws.scaling_law import ScalingLaw, size_at

AHEAD = 8  # grafts that are planned for, at most: more come into view as they are played
LEAST = 2.0  # members that share the weight, at least, as an effective number
NEAR = 0.2  # nats above the lowest loss so far within which losses weigh: laws misfit early ones


def forecast(run: Any, laws: FittedLaws) -> np.ndarray:
    """Expected final loss if a row of telemetry is played now, nats, float64 (A',); ∞: not legal, or a prune."""
    law = members(laws)
    with np.errstate(invalid="ignore"):
        losses = member_losses(run.curve, law)
    if not np.isfinite(losses).all():  # a size's own loss is above ln V
        raise UserError(f"the laws say nothing of a host as small as this one: fit others, with `{FIT}`, to its like.")
    weights = member_weights(run, laws, losses)
    k, clock, now = run.clock.passed, run.clock, losses[-1]
    used, fractions = clock.slice * np.arange(clock.decisions + 1), np.arange(clock.decisions) / clock.decisions
    used[k] = run.reading()
    most = min(AHEAD, int((fractions[k:] < run.spec.optimizer.decay_from).sum()))
    course = course_from(run.spec, run.shape, most, law, clock.slice, used, fractions)
    known = course.classes

    def expected(to: int, end: int, cost: float) -> float:
        """Of a first action that leads to a class, which is paid at decision `end`."""
        tokens = max(0.0, used[end] - used[k] - cost) * course.tokens_per_unit[to]
        plans = np.unique(best_plans(course, end, to, law.trained(now, course.size_loss[to], tokens))[1], axis=0)
        plans[:, k:end] = to
        return float((followed(course, k, 0, now, plans) @ weights).min())

    finals = np.full(len(run.telemetry.actions), np.inf)
    finals[0] = expected(0, k + 1, 0.0)
    of: dict[int, float] = {}  # by class: where in it a graft is makes no difference to a law
    for row in run.telemetry.legal():
        option = run.layout.options[row]
        if option.candidate.operation == "graft":
            to = known.of_totals[option.after.totals()]
            if to not in of:
                of[to] = expected(to, min(clock.decisions, k + int(course.spans[to])), float(known.graft_cost[to]))
            finals[row] = of[to]
    return finals


def member_losses(curve: list[dict[str, Any]], law: ScalingLaw) -> np.ndarray:
    """What M laws say of a run's losses at the points of its curve, nats, float64 (points, M)."""
    sizes = np.array([size_at(point) for point in curve])[..., None]
    tokens = np.diff([float(point["tokens"]) for point in curve], prepend=0.0)
    return law.followed(sizes, tokens[:, None]).reshape(len(curve), -1)


def steady(spec: RunSpec, fractions: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """At which decisions a law has a say: between the rate's warm-up and decay, `NEAR` the lowest; bool (points,)."""
    rate = spec.optimizer
    settled = (fractions > rate.warmup) & (fractions <= rate.decay_from + 1e-9)
    return settled & (losses <= losses[settled].min(initial=np.inf) + NEAR)


def member_weights(run: Any, laws: FittedLaws, losses: np.ndarray) -> np.ndarray:
    """Each member's weight by the run's losses so far, float64 (M,), of sum 1; by their `losses`, (points, M).

    Errors are Gaussian: each decision's own, and one that a run's decisions share. The likelihood is tempered, as in
    sequential Monte Carlo (Jasra et al. 2011), to the largest power that leaves `LEAST` members.
    """
    fractions, seen = np.array(run.seen()).T
    used = steady(run.spec, fractions, seen)
    errors = seen[used, None] - laws.offset - laws.factor * losses[used]
    own, shared = laws.noise**2, laws.misfit**2  # variances
    misses = (np.square(errors).sum(axis=0) - shared * errors.sum(axis=0) ** 2 / (own + shared * used.sum())) / own
    misses -= misses.min()

    def tempered(power: float) -> np.ndarray:
        weights = np.exp(-0.5 * power * misses)
        return weights / weights.sum()

    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.square(tempered(middle)).sum() <= 1 / LEAST else (low, middle)
    return tempered(min(1.0, low))


def members(laws: FittedLaws) -> ScalingLaw:
    """An ensemble's laws as one, whose constants are float64 (M,)."""
    return ScalingLaw(**{name: np.array(values) for name, values in laws.ensemble.items()})


def ensemble(laws: list[ScalingLaw]) -> dict[str, tuple[float, ...]]:
    """Laws as a file has them."""
    return {name: tuple(float(getattr(law, name)) for law in laws) for name in CONSTANTS}
