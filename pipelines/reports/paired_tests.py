"""Paired tests: one arm against one baseline at equal cost; a pair is a seed.

"Better" takes five pairs and a 95 % t interval below 0 after Holm's step-down over the grown arms. Against the best
static size it takes every size (an intersection-union test: Berger 1982, Technometrics 24).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtr

from esper.pipelines.common.statistics import CONFIDENCE, Interval
from esper.pipelines.reports.runs import NEAR, Seeds

PAIRS = 5  # that a test takes at least
BETTER, TIE, WORSE, CANNOT_SAY = "better", "tie", "worse", "cannot say"


@dataclass(frozen=True)
class PairedTest:
    """An arm against a baseline at equal cost."""

    differences: np.ndarray  # the arm's final loss minus the baseline's annealed loss where the arm ended (pairs,)
    beyond: bool = False  # the arm ended beyond the baseline, whose last loss stands: the truth can only be higher
    diverged: str = ""  # seeds on which the arm diverged, in words: it is worse then, however low the rest
    doubt: str = ""  # why "better" cannot be said, whatever the interval says
    left_out: str = ""  # seeds without a pair, in words
    weakest: float = 0.0  # the largest p-value against all static sizes, where the baseline is the best of them
    p_holm: float = 1.0  # `p` adjusted over the grown arms, or over the random controls
    arm: str = ""
    baseline: str = ""
    axis: str = ""
    against: str | None = None  # the label that stands for the baseline

    @property
    def interval(self) -> Interval | None:
        """The mean difference with its 95 % interval; None without a pair at equal cost."""
        return Interval.of(self.differences) if len(self.differences) and not self.beyond else None

    @property
    def p(self) -> float:
        """Twice the one-sided p-value of a paired t test that the mean is below 0; 1 where none can be made."""
        n = len(self.differences)
        if n < 2 or self.beyond:
            return 1.0
        mean, spread = self.differences.mean(), self.differences.std(ddof=1)
        if spread == 0:
            return self.weakest if mean < 0 else 1.0
        return max(self.weakest, min(1.0, 2 * float(stdtr(n - 1, mean / spread * math.sqrt(n)))))

    @property
    def outcome(self) -> tuple[str, str]:
        """Better, tie, worse or cannot say; and what that rests on besides the interval."""
        if self.diverged:
            return WORSE, self.diverged
        if self.interval and not self.differences.any():
            return TIE, "the same losses to the bit"
        if len(self.differences) < PAIRS:
            few = f"{counted(len(self.differences), 'pair')}, and a test takes {PAIRS}"
            return CANNOT_SAY, self.doubt or "; ".join(filter(None, [few, self.left_out]))
        found = Interval.of(self.differences)
        half = found.half or 0.0
        if found.mean - half > 0:
            return WORSE, "it was lower at a lower cost already" if self.beyond else self.left_out
        if self.beyond or self.doubt:
            return CANNOT_SAY, self.doubt or f"{self.against} was never trained that long"
        if found.mean + half >= 0:
            return TIE, self.left_out
        if self.p_holm <= 1 - CONFIDENCE:
            return BETTER, self.left_out
        scope = " and against every static size" if self.weakest else ""
        return TIE, f"the interval alone lies below 0, but for all arms together{scope} p = {self.p_holm:.2g}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        told = {name: getattr(self, name) for name in ("arm", "baseline", "against", "axis", "p", "p_holm")}
        told |= {"pairs": len(self.differences), "interval": self.interval and self.interval.as_dict()}
        return told | dict(zip(("outcome", "reason"), self.outcome, strict=True))


def pair(arm: Seeds, other: Seeds, axis: str) -> PairedTest:
    """Pair an arm's sound runs with a baseline's at the cost at which the arm ended, an axis of AXES."""
    diverged = ", ".join(f"{run.label} diverged on seed {seed}" for seed, run in sorted(arm.items()) if run.diverged)
    differences, left_out, beyond = [], [], False
    for seed in sorted({*arm, *other}):
        lacking = [runs for runs in (arm, other) if seed not in runs or not runs[seed].sound]
        if lacking:
            left_out.append(f"{next(iter(lacking[0].values())).label} has no loss on seed {seed}")
            continue
        run, baseline = arm[seed], other[seed]
        cost, longest = run.final(axis), baseline.final(axis)
        if not (cost > 0 and longest > 0):
            return PairedTest(np.empty(0), doubt="not all costs are known")
        beyond |= cost > longest * (1 + NEAR)
        ended = cost > longest / (1 + NEAR)
        differences.append(run.loss - (baseline.loss if ended else float(baseline.loss_at(axis, cost))))
    if not np.isfinite(differences).all():
        return PairedTest(np.empty(0), doubt="it has no annealed loss at so low a cost")
    return PairedTest(np.array(differences), beyond, diverged, left_out="; ".join(left_out))


def corrected(family: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests of a family of arms, with Holm's p-values."""
    return [replace(test, p_holm=float(p)) for test, p in zip(family, holm([t.p for t in family]), strict=True)]


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values (n,), in the given order (Holm 1979, https://www.jstor.org/stable/4615733)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.array(p)[order] * np.arange(len(order), 0, -1)))
    return adjusted


def counted(n: int, noun: str) -> str:
    """`1 run`, `2 runs`, `no runs`."""
    return f"{n or 'no'} {noun}{'' if n == 1 else 's'}"
