"""Paired tests of the arms of a sweep that grew, each against its baselines at equal cost; a pair is a seed.

The baselines: the static run of the arm's final size, the best static size, the best fixed schedule. "Better" takes
five pairs and a 95 % interval below 0 (`common/statistics.py`) after Holm's step-down over the grown arms. Against the
best static size it takes every size (an intersection-union test: Berger 1982, Technometrics 24).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, Literal

import numpy as np

from esper.pipelines.common.statistics import CONFIDENCE, Interval, detectable, p_below
from esper.pipelines.reports.runs import NEAR, Run, Seeds
from esper.pipelines.sweeps.arms import NOT_GROWN, RANDOM, SCHEDULES, STATIC
from esper.platform.console import counted

PAIRS = 5  # that a test takes at least
Outcome = Literal["better", "tie", "worse", "cannot say"]
FINAL_SIZE, BEST_STATIC, BEST_SCHEDULE = BASELINES = ("final size", "best static", "best schedule")
EQUAL_COST = {"steps": "tokens"}  # a step takes the same tokens in every arm
DRAWN = 50  # points of an envelope


@dataclass(frozen=True)
class PairedTest:
    """An arm against a baseline at equal cost."""

    differences: np.ndarray  # the arm's final loss minus the baseline's annealed loss where the arm ended (pairs,)
    beyond: bool = False  # the arm ended beyond the baseline, whose last loss stands: the truth can only be higher
    diverged: str = ""  # seeds on which the arm diverged, in words: it is worse then, however low the rest
    doubt: str = ""  # why "better" cannot be said, whatever the interval says
    left_out: str = ""  # seeds without a pair, in words
    sequential: bool = False  # pairs were added while one looked
    weakest: float = 0.0  # the largest p-value against all static sizes, where the baseline is the best of them
    p_holm: float = 1.0  # `p` adjusted over the grown arms, or over the random controls
    arm: str = ""
    baseline: str = ""
    axis: str = ""
    against: str | None = None  # the label that stands for the baseline

    @property
    def interval(self) -> Interval | None:
        """The mean difference with its 95 % interval; None without a pair at equal cost."""
        return Interval.of(self.differences, self.sequential) if len(self.differences) and not self.beyond else None

    @property
    def p(self) -> float:
        """Twice the one-sided p-value of a paired test that the mean is below 0; 1 where none can be made."""
        return 1.0 if self.beyond else max(self.weakest, p_below(self.differences, self.sequential))

    @property
    def detectable(self) -> float | None:
        """The smallest difference that so many pairs with this spread would show."""
        return detectable(self.differences, self.sequential)

    @property
    def outcome(self) -> tuple[Outcome, str]:
        """Better, tie, worse or cannot say; and what that rests on besides the interval."""
        if self.diverged:
            return "worse", self.diverged
        if self.interval and not self.differences.any():
            return "tie", "the same losses to the bit"
        if len(self.differences) < PAIRS:
            few = f"{counted(len(self.differences), 'pair')}, and a test takes {PAIRS}"
            return "cannot say", self.doubt or "; ".join(filter(None, [few, self.left_out]))
        found = Interval.of(self.differences, self.sequential)
        low, high = found.mean - (found.half or 0.0), found.mean + (found.half or 0.0)
        if low > 0:
            return "worse", "it was lower at a lower cost already" if self.beyond else self.left_out
        if self.beyond or self.doubt:
            return "cannot say", self.doubt or f"{self.against} was never trained that long"
        if high < 0 and self.p_holm > 1 - CONFIDENCE:
            return "tie", f"p = {self.p_holm:.2g} for all arms together{' and every static size' * bool(self.weakest)}"
        return "better" if high < 0 else "tie", self.left_out

    def as_dict(self) -> dict[str, Any]:
        names = ("arm", "baseline", "against", "axis", "p", "p_holm", "detectable")
        told = {name: getattr(self, name) for name in names}
        told |= {"pairs": len(self.differences), "interval": self.interval and self.interval.as_dict()}
        return told | dict(zip(("outcome", "reason"), self.outcome, strict=True))


def pair(arm: Seeds, other: Seeds, axis: str, sequential: bool = False) -> PairedTest:
    """Pair an arm's sound runs with a baseline's at the cost at which the arm ended, an axis of AXES."""
    diverged = ", ".join(f"{run.label} diverged on seed {seed}" for seed, run in arm.items() if run.diverged)
    differences, left_out, beyond = [], [], False
    for seed in sorted({*arm, *other}):
        if lacking := [runs for runs in (arm, other) if seed not in runs or not runs[seed].sound]:
            left_out.append(f"{next(iter(lacking[0].values())).label} has no loss on seed {seed}")
            continue
        run, baseline = arm[seed], other[seed]
        cost, longest = run.summary[axis], baseline.summary[axis]
        beyond |= cost > longest * (1 + NEAR)
        ended = cost > longest / (1 + NEAR)
        differences.append(run.loss - (baseline.loss if ended else float(baseline.loss_at(axis, cost))))
    if not np.isfinite(differences).all():
        return PairedTest(np.empty(0), diverged=diverged, doubt="it has no annealed loss at so low a cost")
    return PairedTest(np.array(differences), beyond, diverged, left_out="; ".join(left_out), sequential=sequential)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values (n,), in the given order (Holm 1979, https://www.jstor.org/stable/4615733)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.array(p)[order] * np.arange(len(order), 0, -1)))
    return adjusted


class Trials:
    """The runs of a grid point (an entry of `points`), by purpose; `sequential`: seeds were added while one looked."""

    def __init__(
        self, runs: Iterable[Run], point: dict[str, Any], labels: Sequence[str], sequential: bool = False
    ) -> None:
        self.point, self.labels, self.sequential = point, labels, sequential
        self.runs = [run for run in runs if run.grid == point["grid"]]
        self.title = ", ".join(f"{key} = {value}" for key, value in json.loads(point["grid"]).items())
        axis, self.amount = str(point["budget"]["axis"]), float(point["budget"]["amount"])
        self.axis = EQUAL_COST.get(axis, axis)  # of AXES, on which all that is equal at equal budget
        self.budget = f"{self.amount:,.10g} {axis.replace('_', '-')}"
        tests: dict[str, dict[int, Run]] = {label: {} for label in labels}
        for run in sorted(self.runs, key=lambda run: (run.seed, run.status == "FINISHED")):
            if run.purpose == "test":
                tests[run.label][run.seed] = run  # of a trial that was run again, the one that ended
        self.test = {label: seeds for label, seeds in tests.items() if seeds}  # statics first, from small to large
        self.arms = {label: next(iter(seeds.values())).arm for label, seeds in self.test.items()}
        grew = {label for label, seeds in self.test.items() if any(run.grafts for run in seeds.values())}
        self.grown = [label for label, arm in self.arms.items() if label in grew and arm != RANDOM]
        self.controls = [label for label, arm in self.arms.items() if label in grew and arm == RANDOM]
        self.idle = [label for label, arm in self.arms.items() if label not in grew and arm not in NOT_GROWN]
        sound = {label: own for label in self.test if (own := self.sound(label))}
        self.statics = {label: own for label, own in sound.items() if self.arms[label] == STATIC}
        self.schedules = {label: own for label, own in sound.items() if self.arms[label] in SCHEDULES}
        # Chosen on tuning seeds, else on the test seeds.
        size, schedule = point.get("size"), point.get("schedule")
        self.best_static = best(self.statics) if size is None else f"{STATIC}-{size}"
        self.schedule: str | None = best(self.schedules) if schedule is None else schedule

    def sound(self, label: str | None) -> dict[int, Run]:
        """A label's sound test runs by seed; empty if it has none."""
        return {seed: run for seed, run in self.test.get(label or "", {}).items() if run.sound}

    def test_runs(self) -> list[Run]:
        return [run for seeds in self.test.values() for run in seeds.values()]

    def tests(self, axis: str) -> list[PairedTest]:
        """All tests at equal cost on an axis; Holm corrects grown arms and random controls separately."""
        families = (self.family(own, each, axis) for each, own in product(BASELINES, (self.grown, self.controls)))
        return list(chain.from_iterable(families))

    def family(self, labels: Sequence[str], baseline: str, axis: str) -> list[PairedTest]:
        """The tests of these arms, corrected by Holm, against a baseline that none of them is."""
        arms = [arm for arm in labels if (baseline, arm) != (BEST_SCHEDULE, self.schedule)]
        tests = [self._test(arm, baseline, axis) for arm in arms]
        joint = holm([test.p for test in tests])
        return [replace(test, p_holm=float(p)) for test, p in zip(tests, joint, strict=True)]

    def _test(self, arm: str, baseline: str, axis: str) -> PairedTest:
        mine, doubt, weakest = self.test[arm], "", 0.0
        against = self._final_size(arm) if baseline == FINAL_SIZE else self.schedule
        if baseline == BEST_STATIC:
            # The arm must beat every size: else an arm equal to the best wins 8 % of sweeps with 4 nearly equal sizes.
            pairs = {label: pair(mine, self.test[label], axis, self.sequential) for label in self.statics}
            equal = {label: test for label, test in pairs.items() if test.interval}
            weakest, against = max((test.p for test in equal.values()), default=0.0), self.best_static
            if axis != self.axis:
                means = {label: np.mean(t.differences) for label, t in (equal or pairs).items() if len(t.differences)}
                against = max(means, key=means.__getitem__, default=next(iter(pairs), None))
                if unknown := ", ".join(label for label in pairs if label not in equal):
                    doubt = f"{unknown} has no loss at this cost, and may be lower"
        if against is None or against not in self.test:
            return PairedTest(np.empty(0), doubt="it was not trained", arm=arm, baseline=baseline, axis=axis)
        found = pair(mine, self.test[against], axis, self.sequential)
        grew = sum(run.grafts > 0 for run in mine.values())
        if grew < PAIRS <= len(found.differences):
            doubt = f"it grew on {counted(grew, 'seed')} only, and a test takes {PAIRS}"
        doubt = found.doubt or doubt
        return replace(found, doubt=doubt, weakest=weakest, arm=arm, baseline=baseline, axis=axis, against=against)

    def _final_size(self, arm: str) -> str:
        # The label of the runs born in the arm's final shape: a static size where one fits, for its rate is tuned. The
        # layers of statics are alike: another shape has as many parameters only by coincidence.
        ends = {run.summary["parameters"] for run in self.sound(arm).values()}
        fitting = (s for s, runs in self.statics.items() if {r.summary["parameters"] for r in runs.values()} == ends)
        return next(fitting, f"static_final:{arm}")


def best(candidates: Mapping[str, Seeds]) -> str | None:
    """The label whose sound runs end lowest in the mean."""
    return min(candidates, key=lambda label: np.mean([r.loss for r in candidates[label].values()]), default=None)


def draw_envelope(statics: Iterable[Seeds], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Costs (points,) and the lowest mean annealed loss (points,) of any static size by each cost; never rises."""
    sizes = [list(runs.values()) for runs in statics]
    ends = [cost for runs in sizes for run in runs for cost in run.points(axis)[0][[0, -1]]]
    if not ends:
        return np.empty(0), np.empty(0)
    costs = np.unique(np.geomspace(min(ends), max(ends), DRAWN))
    means = [np.mean([run.loss_at(axis, costs) for run in runs], axis=0) for runs in sizes]
    losses = np.fmin.accumulate(np.fmin.reduce(means))
    return costs[np.isfinite(losses)], losses[np.isfinite(losses)]
