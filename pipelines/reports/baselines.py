"""Baselines of every grown arm: the static run of its final size, the best static size, the best fixed schedule.

A run without a graft is a static run: an arm that never grew is reported so, and not tested.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from esper.pipelines.reports.paired_tests import PAIRS, PairedTest, corrected, counted, pair
from esper.pipelines.reports.runs import AXES, Run, Seeds
from esper.pipelines.sweeps.arms import NOT_GROWN, RANDOM, SCHEDULES, STATIC

FINAL_SIZE, BEST_STATIC, BEST_SCHEDULE = BASELINES = ("final size", "best static", "best schedule")
EQUAL_COST = {"steps": "tokens"}  # a step takes the same tokens in every arm
DRAWN = 50  # points of an envelope


class Trials:
    """One grid point's runs, by what they are for."""

    def __init__(self, runs: Sequence[Run], point: dict[str, Any]) -> None:
        self.point = point
        self.runs = [run for run in runs if run.grid == point["grid"]]
        self.title = ", ".join(f"{key} = {value}" for key, value in json.loads(point["grid"]).items())
        axis, self.amount = str(point["budget"]["axis"]), float(point["budget"]["amount"])
        self.axis = EQUAL_COST.get(axis, axis)  # of AXES, on which all that is equal at equal budget
        self.budget = f"{self.amount:,.10g} {axis.replace('_', '-')}"
        self.test: dict[str, dict[int, Run]] = {}  # label → seed → test run; statics first, from small to large
        for run in sorted(self.runs, key=lambda run: (run.arm != STATIC, run.arm == STATIC and run.size)):
            if run.purpose == "test":
                self.test.setdefault(run.label, {})[run.seed] = run
        self.arms = {label: next(iter(seeds.values())).arm for label, seeds in self.test.items()}
        self.statics = self._sound(label for label, arm in self.arms.items() if arm == STATIC)
        may_grow = [label for label, arm in self.arms.items() if arm not in NOT_GROWN]
        grew = [label for label in may_grow if any(run.grafts for run in self.test[label].values())]
        self.grown = [label for label in grew if self.arms[label] != RANDOM]  # that a verdict is about
        self.controls = [label for label in grew if self.arms[label] == RANDOM]
        self.idle = {label: self._same_static(label) for label in may_grow if label not in grew}
        self.schedules = self._sound(label for label in may_grow if self.arms[label] in SCHEDULES)
        # Chosen on tuning seeds, else on the test seeds.
        of_size = {self.size(label): label for label in self.statics}
        self.best_static = best(self.statics) if point["size"] is None else of_size.get(point["size"])
        self.schedule: str | None = best(self.schedules) if point["schedule"] is None else point["schedule"]

    def sound(self, label: str | None) -> dict[int, Run]:
        """A label's sound test runs by seed; empty if it has none."""
        return {seed: run for seed, run in sorted(self.test.get(label or "", {}).items()) if run.sound}

    def size(self, label: str) -> int | None:
        """A static label's layers."""
        return next(iter(self.test[label].values())).size

    def test_runs(self) -> list[Run]:
        """In the order of `test`, and by seed."""
        return [run for seeds in self.test.values() for _, run in sorted(seeds.items())]

    def _sound(self, labels: Iterable[str]) -> dict[str, dict[int, Run]]:
        return {label: runs for label in labels if (runs := self.sound(label))}

    def _same_static(self, label: str) -> str | None:
        ends = {
            label: {(seed, run.loss, *map(run.final, AXES)) for seed, run in self.sound(label).items()}
            for label in (label, *self.statics)
        }
        return next((static for static in self.statics if ends[label] and ends[label] <= ends[static]), None)

    def tests(self, baseline: str, axis: str) -> list[PairedTest]:
        """All tests against one kind of baseline; Holm corrects grown arms and random controls separately."""
        arms = [arm for arm in self.grown if not (baseline == BEST_SCHEDULE and arm == self.schedule)]
        families = [[self._test(arm, baseline, axis) for arm in family] for family in (arms, self.controls)]
        return [test for family in families for test in corrected(family)]

    def _test(self, arm: str, baseline: str, axis: str) -> PairedTest:
        mine, doubt, weakest = self.test[arm], "", 0.0
        against = self._final_size(arm) if baseline == FINAL_SIZE else self.schedule
        if baseline == BEST_STATIC:
            # The arm must beat every size: else an arm equal to the best wins 8 % of sweeps with 4 nearly equal sizes.
            pairs = {label: pair(mine, self.test[label], axis) for label in self.statics}
            equal = {label: test for label, test in pairs.items() if test.interval}
            weakest = max((test.p for test in equal.values()), default=0.0)
            against = self.best_static
            if axis != self.axis:
                means = {label: np.mean(t.differences) for label, t in (equal or pairs).items() if len(t.differences)}
                against = max(means, key=means.__getitem__, default=next(iter(pairs), None))
                if unknown := ", ".join(label for label in pairs if label not in equal):
                    doubt = f"{unknown} has no loss at this cost, and may be lower"
        if against is None or against not in self.test:
            return PairedTest(np.empty(0), doubt="it was not trained", arm=arm, baseline=baseline, axis=axis)
        found = pair(mine, self.test[against], axis)
        grew = sum(run.grafts > 0 for run in mine.values())
        if grew < PAIRS <= len(found.differences):
            doubt = f"it grew on {counted(grew, 'seed')} only, and a test takes {PAIRS}"
        doubt = found.doubt or doubt
        return replace(found, doubt=doubt, weakest=weakest, arm=arm, baseline=baseline, axis=axis, against=against)

    def _final_size(self, arm: str) -> str:
        """Label of the runs born in the arm's final shape: a static size where one fits, for its rate is tuned."""
        ends = {run.final("parameters") for run in self.sound(arm).values()}
        # The layers of statics are alike: another shape has as many parameters only by coincidence.
        alike = (
            label for label, runs in self.statics.items() if {r.final("parameters") for r in runs.values()} == ends
        )
        return next(alike, f"static_final:{arm}")


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
