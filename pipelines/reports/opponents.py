"""Whom every grown arm is held against: static of its final size, the best static size, the best fixed schedule."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esper.pipelines.reports.claims import Claim, Pairs, pair, settle
from esper.pipelines.reports.envelope import Seeds, TrialRun, best_size, sound
from esper.pipelines.sweeps.arm_names import NOT_GROWN, RANDOM, SCHEDULES, STATIC

FINAL_SIZE, ENVELOPE, SCHEDULE = OPPONENTS = ("final size", "envelope", "schedule")
EQUAL_COST = {"steps": "tokens"}  # a step takes the same tokens in every arm


class Bench:
    """One grid point's runs, by what they are for.

    Attributes:
        runs: all of them.
        budget: in the words that it was given in: `40 steps`.
        axis: of AXES, on which all that is equal at equal budget.
        amount: the budget, in the unit that it was given in.
        test: label → seed → test run.
        grown: labels of the arms that decide or schedule when to grow: those that a verdict is about.
        controls: labels of the arms that grow at random.
        statics: size → sound test runs; sizes without any are left out.
        tuning: the same of the tuning runs.
        size: the static size that stands for the envelope at equal budget: chosen on tuning seeds, else the best on the
            test seeds; None without static runs.
        schedule: label of the best fixed schedule, likewise.
    """

    def __init__(self, runs: Sequence[TrialRun], point: dict[str, Any]) -> None:
        self.runs = runs
        axis, self.amount = str(point["budget"]["axis"]), float(point["budget"]["amount"])
        self.axis = EQUAL_COST.get(axis, axis)
        self.budget = f"{self.amount:,.10g} {axis.replace('_', '-')}"
        self.test = _by_label(runs, "test")
        self.grown = [label for label, seeds in self.test.items() if _arm(seeds) not in (*NOT_GROWN, RANDOM)]
        self.controls = [label for label, seeds in self.test.items() if _arm(seeds) == RANDOM]
        self.schedules = [label for label in self.grown if _arm(self.test[label]) in SCHEDULES]
        self.statics, self.tuning = _by_size(self.test), _by_size(_by_label(runs, "tuning"))
        self.size = best(self.statics) if point["size"] is None else int(point["size"])
        self.schedule = point["schedule"]
        if self.schedule is None:
            self.schedule = best({label: sound(self.test[label]) for label in self.schedules})

    def static(self, size: int | None) -> str | None:
        """The label of a static size's test runs, None if it has none."""
        runs = self.statics.get(size) if size is not None else None
        return next(iter(runs.values())).label if runs else None

    def claims(self, opponent: str, axis: str) -> list[Claim]:
        """All claims against one kind of opponent: the grown arms' and, corrected among themselves, the controls'.

        The best schedule makes none against itself.
        """
        arms = [arm for arm in self.grown if not (opponent == SCHEDULE and arm == self.schedule)]
        return [
            claim
            for family in (arms, self.controls)
            for claim in settle([(arm, *self.against(arm, opponent, axis)) for arm in family], opponent, axis)
        ]

    def against(self, arm: str, opponent: str, axis: str) -> tuple[str | None, Pairs]:
        """The label that stands for an opponent of an arm, and their pairs."""
        if opponent == ENVELOPE:
            return self._envelope(arm, axis)
        against = self._final_size(arm) if opponent == FINAL_SIZE else self.schedule
        if against is None or against not in self.test:
            none = "no fixed schedule has test runs" if opponent == SCHEDULE else "its final size was not trained"
            return None, Pairs(unknown=none)
        return against, pair(self.test[arm], self.test[against], axis, own=axis == self.axis)

    def _final_size(self, arm: str) -> str:
        """Label of the runs born in the shape an arm ended with; a static size's first, which has a rate of its own."""
        ends = {run.final["parameters"] for run in sound(self.test[arm]).values()}
        # Layers that are all alike: no other growth gives the same number of parameters, but by coincidence.
        alike = [size for size, runs in self.statics.items() if {r.final["parameters"] for r in runs.values()} == ends]
        return (self.static(alike[0]) if alike else None) or f"static_final:{arm}"

    def _envelope(self, arm: str, axis: str) -> tuple[str | None, Pairs]:
        own, mine = axis == self.axis, self.test[arm]
        costs = [run.final[axis] for run in sound(mine).values() if run.final[axis] > 0]
        if own or not costs:
            size, doubt = self.size, ""
        else:
            size, doubt = best_size(self.tuning or self.statics, axis, float(np.median(costs)))
        against = self.static(size)
        if against is None:
            return None, Pairs(unknown=f"no static size with test runs is known at these {axis.replace('_', '-')}")
        pairs = pair(mine, self.test[against], axis, own=own)
        pairs.doubt = doubt
        # The size was chosen on few seeds and may not be the best: the arm has to get below every one. Means alone
        # would let an arm that equals the best size win in 8 % of sweeps with four nearly equal sizes.
        labels = [label for label in map(self.static, self.statics) if label]
        others = {label: pair(mine, self.test[label], axis, own=own) for label in labels}
        pairs.weakest = max([other.p for other in others.values() if not (other.beyond or other.unknown)], default=0.0)
        lower = [label for label, other in others.items() if len(other.differences) and other.differences.mean() >= 0]
        if lower:
            lower_mean = f"{', '.join(lower)} ends as low or lower in the mean"
            pairs.barred = "; ".join(filter(None, [pairs.barred, lower_mean]))
        return against, pairs


def best(candidates: dict[Any, dict[int, TrialRun]]) -> Any:
    """The key whose sound runs end lowest in the mean; None without any."""
    means = {key: np.mean([run.loss for run in runs.values()]) for key, runs in candidates.items() if runs}
    return min(means, key=means.__getitem__) if means else None


def _arm(seeds: Seeds) -> str:
    return next(iter(seeds.values())).arm


def _by_label(runs: Sequence[TrialRun], purpose: str) -> dict[str, dict[int, TrialRun]]:
    labels: dict[str, dict[int, TrialRun]] = {}
    for run in runs:
        if run.purpose == purpose:
            labels.setdefault(run.label, {})[run.seed] = run
    return labels


def _by_size(labels: dict[str, dict[int, TrialRun]]) -> dict[int, dict[int, TrialRun]]:
    """Sound static runs by their size, in increasing order."""
    sizes = {}
    for seeds in labels.values():
        run = next(iter(seeds.values()))
        if run.arm == STATIC and run.size is not None and sound(seeds):
            sizes[run.size] = sound(seeds)
    return dict(sorted(sizes.items()))
