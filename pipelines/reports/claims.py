"""Claims: one arm against one opponent on one axis, and Holm's correction over the arms.

A pair is a seed: the arm's final loss minus the opponent's annealed loss at the cost at which the arm ended. "Better"
is said only where the 95 % interval of the paired differences lies below 0, after Holm's step-down over the grown arms
(over the random controls, among these); than the envelope, only where it does against every static size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtr

from esper.pipelines.common.statistics import CONFIDENCE, Interval
from esper.pipelines.reports.envelope import NEAR, Seeds, sound

BETTER, WORSE, TIE, NOT_BETTER, CANNOT_SAY = "better", "worse", "tie", "not better", "cannot say"


@dataclass(frozen=True)
class Claim:
    """What a sweep says about an arm against an opponent at equal cost.

    Attributes:
        arm: the arm's label.
        opponent: "final size" (static of the size it ended with), "envelope" (best static size) or "schedule" (best
            fixed schedule).
        against: the label that stands for the opponent; None where there is none.
        axis: the cost that is equal.
        outcome: "better", "worse", "tie", "not better" or "cannot say".
        interval: the arm's loss minus the opponent's, with its 95 % interval; None without two pairs at equal cost.
        p: twice the one-sided p-value of "better", at most 1: below 0.05 where the interval lies below 0 (against the
            envelope: where it does for every static size).
        p_holm: the same, adjusted by Holm's method over the grown arms, or over the random controls.
        seeds: pairs.
        reason: why it is no plain better, worse or tie, and which pairs are left out; empty where all is plain.
    """

    arm: str
    opponent: str
    against: str | None
    axis: str
    outcome: str
    interval: Interval | None
    p: float
    p_holm: float
    seeds: int
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "interval": interval_dict(self.interval)}


def interval_dict(interval: Interval | None) -> dict[str, float | None] | None:
    """As JSON values."""
    return interval and {"mean": interval.mean, "half_width_95": interval.half}


def in_words(interval: Interval) -> str:
    """Mean and both ends: `+0.0030 [-0.0100, +0.0160]`."""
    if interval.half is None:
        return f"{interval.mean:+.4f}"
    return f"{interval.mean:+.4f} [{interval.mean - interval.half:+.4f}, {interval.mean + interval.half:+.4f}]"


@dataclass
class Pairs:
    """The pairs of an arm and an opponent on an axis, and what stands in the way of a claim.

    Attributes:
        differences: the arm's loss minus the opponent's (pairs,).
        beyond: whether the opponent was never trained as long as the arm on some seed. Its last loss stands there, so
            that the true difference can only be higher.
        notes: pairs that are left out, and why.
        unknown: why there is no comparison at all.
        barred: why the arm is not better, whatever the interval says.
        doubt: why "better" cannot be said, though the interval may say it.
        weakest: the largest p-value against the other static sizes, where the opponent is the envelope: to be better
            than that is to be better than every size.
    """

    differences: np.ndarray = field(default_factory=lambda: np.empty(0))
    beyond: bool = False
    notes: list[str] = field(default_factory=list)
    unknown: str = ""
    barred: str = ""
    doubt: str = ""
    weakest: float = 0.0

    @property
    def p(self) -> float:
        """Twice the one-sided p-value of a paired t test that the mean is below 0; 1 where no interval is known.

        For the envelope, the largest over the static sizes (an intersection-union test: Berger 1982, Technometrics 24).
        """
        n = len(self.differences)
        if n < 2 or self.beyond or self.unknown:
            return 1.0
        mean, spread = self.differences.mean(), self.differences.std(ddof=1)
        if spread == 0:
            return self.weakest if mean < 0 else 1.0
        return max(self.weakest, min(1.0, 2 * float(stdtr(n - 1, mean / spread * math.sqrt(n)))))

    def outcome(self, p_holm: float) -> tuple[str, Interval | None, str]:
        """What can be said, the interval, and why it is no plain better, worse or tie."""
        n, nothing = len(self.differences), self.unknown
        mean = float(self.differences.mean()) if n else math.nan
        if not nothing and n < 2:
            nothing = f"there {'is only one pair' if n else 'are no pairs'}, and an interval needs two"
        elif not nothing and self.beyond:
            if mean >= 0:
                return NOT_BETTER, None, f"the opponent was as low at a lower cost already (difference {mean:+.4f})"
            nothing = "the opponent was never trained that long"
        if nothing:
            return (NOT_BETTER, None, self.barred) if self.barred else (CANNOT_SAY, None, nothing)
        interval = Interval.of(self.differences)
        if mean - (interval.half or 0.0) > 0:
            return WORSE, interval, ""
        below = mean + (interval.half or 0.0) < 0
        if self.barred and (below or self.doubt):
            return NOT_BETTER, interval, self.barred
        if self.doubt:
            return CANNOT_SAY, interval, self.doubt
        if below and p_holm > 1 - CONFIDENCE:
            scope = " and against every static size" if self.weakest else ""
            return TIE, interval, f"the interval alone lies below 0, but for all arms together{scope} p = {p_holm:.2g}"
        return (BETTER, interval, "") if below else (TIE, interval, "")


def pair(arm: Seeds, opponent: Seeds, axis: str, *, own: bool) -> Pairs:
    """Pair an arm's sound runs with an opponent's by seed, at the cost at which the arm ended.

    Args:
        arm, opponent: a label's runs by seed; at least one each.
        axis: of AXES.
        own: whether it is the budget's own axis, on which two runs of a budget end at the same cost, overshoot aside.
    """
    notes = [_absent(runs, seed) for seed in sorted({*arm, *opponent}) for runs in (arm, opponent)]
    differences, beyond = [], False
    for seed in sorted(sound(arm).keys() & sound(opponent).keys()):
        run, other = arm[seed], opponent[seed]
        cost, (costs, _) = run.final[axis], other.points[axis]
        if own and abs(other.final[axis] / cost - 1) <= NEAR:
            differences.append(run.loss - other.loss)
            continue
        if not (len(costs) and cost > 0):
            return Pairs(unknown=f"not all {axis.replace('_', '-')} are known")
        if cost < costs[0]:
            return Pairs(unknown=f"{other.label} has no annealed loss at so low a cost")
        beyond |= bool(cost > costs[-1])
        differences.append(run.loss - other.loss_by(axis, cost))
    barred = ", ".join(f"{run.label} diverged on seed {seed}" for seed, run in sorted(arm.items()) if run.diverged)
    return Pairs(np.array(differences), beyond, [note for note in notes if note], barred=barred)


def _absent(runs: Seeds, seed: int) -> str:
    """Why a label has no final loss on a seed; empty if it has one."""
    if seed in runs and runs[seed].sound:
        return ""
    how = "has no run" if seed not in runs else "diverged" if runs[seed].diverged else "failed"
    return f"{next(iter(runs.values())).label} {how} on seed {seed}"


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values (n,), in the given order (Holm 1979, https://www.jstor.org/stable/4615733)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.array(p)[order] * np.arange(len(order), 0, -1)))
    return adjusted


def settle(entries: Sequence[tuple[str, str | None, Pairs]], opponent: str, axis: str) -> list[Claim]:
    """The claims of a family of arms against one kind of opponent on one axis; Holm's method corrects over them.

    Args:
        entries: per arm: its label, the label it is held against, their pairs.
        opponent: what kind of opponent.
        axis: of AXES.
    """
    claims = []
    p = [pairs.p for *_, pairs in entries]
    for (arm, against, pairs), p_raw, p_holm in zip(entries, p, holm(p).tolist(), strict=True):
        outcome, interval, reason = pairs.outcome(p_holm)
        reason = "; ".join(filter(None, [reason, *(note for note in pairs.notes if note not in reason)]))
        seeds = len(pairs.differences)
        claims.append(Claim(arm, opponent, against, axis, outcome, interval, p_raw, p_holm, seeds, reason))
    return claims
