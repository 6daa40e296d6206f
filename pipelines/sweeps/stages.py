"""A sweep's stages: what is run after what, and what is settled in between.

1. rates: the learning rate of each static size, on tuning seeds (`--tune-lr`).
2. tuning: the best static size and schedule, on tuning seeds; then the controller and its schedule for `openloop`.
3. test: every arm that follows no other, on test seeds.
4. follow: those that need another arm's run of the same seed.

A resumed sweep walks the same way and runs what is missing. What is settled stays settled, also where trials for it
failed: a new choice would change under runs that rest on it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from esper.pipelines.controllers.evaluation import median_grafts
from esper.pipelines.sweeps.arms import FINAL, LRPATH, OPENLOOP, PPO, SCHEDULES, STATIC, Arm
from esper.pipelines.sweeps.log import SUMMARY, SweepLog
from esper.pipelines.sweeps.plan import Point, SweepPlan
from esper.pipelines.sweeps.rates import ROUNDS, best_rate, bracketed, next_rates
from esper.pipelines.sweeps.trials import (
    Purpose,
    Trial,
    cost,
    final_spec,
    lrpath_spec,
    size_parameters,
    static_spec,
    with_cooldowns,
    with_rates,
)
from esper.platform.console import counted, say
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.ledger import AXES
from esper.platform.spec import RunSpec
from esper.platform.storage import write_json
from esper.policies.arms import ArmInputs
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.rate import stable_rate

STAGES = ("rates", "tuning", "openloop", "test", "follow")
Batch = tuple[str, list[Trial], bool]  # a stage, its trials, and whether to run missing ones: not once it is settled
Train = Callable[[Point, RunSpec, Sequence[dict[str, Any]]], dict[str, Any]]  # spec with rates, static tuning summaries


class Settled(Frozen):
    """What is settled for a grid point; a field that has not been set is open."""

    rates: dict[int, float] | None = None  # best rate by static size
    bracketed: bool = False  # each of them lies between two others that were tried
    size: int | None = None  # the best static one; None where nobody could choose
    schedule: str | None = None  # label of the best one, likewise
    controller: dict[str, Any] | None = None  # `trained_on`, `checkpoint` and what it has `spent`, if there is one
    no_controller: str | None = None  # why there is none
    openloop: bool = False  # the controller's median schedule is known


class PointStages:
    """The stages of one grid point, from what has been settled before."""

    def __init__(
        self, plan: SweepPlan, point: Point, settled: Settled, inputs: Mapping[str, Path], log: SweepLog, train: Train
    ) -> None:
        self.point, self.settled = point, settled
        self._plan, self._inputs, self._log, self._train = plan, inputs, log, train
        if "policy" in inputs:
            self._settle(controller={"checkpoint": str(inputs["policy"]), "trained_on": "given"})

    def batches(self) -> Iterator[Batch]:
        """The trials, batch by batch; run each batch before asking for the next."""
        if self._plan.tune_lr:
            yield from self._find_rates()
        yield from self._choose()
        if self._plan.trains and self._open("controller"):
            self._train_controller()
        if self._plan.has(OPENLOOP):
            yield from self._distill()
        for stage, follow in (("test", False), ("follow", True)):
            arms = [arm for arm in self._plan.arms if (arm.of is not None) == follow]
            yield stage, self._trials(arms, "test"), True

    def spent(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """What tuning trials and the controller have used on each ledger axis, by purpose."""
        runs = [(trial, self._log.summary(trial)) for trial in trials]
        costs = [(trial.purpose, cost(trial.spec, summary)) for trial, summary in runs if summary is not None]
        parts: dict[str, Any] = {
            purpose: {axis: sum(used[axis] for of, used in costs if of == purpose) for axis in AXES}
            for purpose in ("rates", "tuning")
        }
        return parts | ({"controller": self.settled.controller.get("spent")} if self.settled.controller else {})

    def _find_rates(self) -> Iterator[Batch]:
        spec, seeds, still_open = self.point.spec, self._plan.tuning_seeds, self._open("rates")
        tried: dict[int, dict[float, list[float]]] = {size: {} for size in self._plan.sizes}
        for _ in range(ROUNDS):
            trials = {
                (size, rate): [self._rate_trial(size, rate, seed) for seed in seeds]
                for size, losses in tried.items()
                for rate in next_rates(stable_rate(spec.optimizer, size_parameters(spec, size)), losses)
            }
            if not trials:
                break
            yield "rates", [trial for group in trials.values() for trial in group], still_open
            for (size, rate), group in trials.items():
                tried[size][rate] = self._losses(group)
        if still_open:
            rates = {size: best_rate(losses) for size, losses in tried.items()}
            self._settle(rates=rates, bracketed=all(map(bracketed, tried.values())))
        found = [f"{rate:g} at {counted(size, 'layer')}" for size, rate in (self.settled.rates or {}).items()]
        say(f"rates   {self.point}{', '.join(found)}")

    def _choose(self) -> Iterator[Batch]:
        sizes, schedules = self._plan.statics(), [arm for arm in self._plan.arms if arm.name in SCHEDULES]
        tuned = [arm for group in (sizes, schedules) if len(group) > 1 for arm in group]
        trials = {arm: self._trials([arm], "tuning") for arm in tuned if self._plan.tuning_seeds}
        if trials:
            yield "tuning", [trial for group in trials.values() for trial in group], self._open("size")
        if self._open("size"):
            losses = {arm: fmean(self._losses(group)) for arm, group in trials.items()}
            size, schedule = _best(sizes, losses), _best(schedules, losses)
            self._settle(size=size and size.size, schedule=schedule and schedule.label)
        if trials:
            size, schedule = self.settled.size, self.settled.schedule
            found = "every size failed" if size is None else counted(size, "layer")
            say(f"tuning  {self.point}best: {found}" + (f", schedule {schedule}" if schedule else ""))

    def _train_controller(self) -> None:
        tuning = self._summaries(self._trials(self._plan.statics(), "tuning"))
        try:
            self._settle(controller=self._train(self.point, self._spec, [s for s in tuning if not s["diverged"]]))
        except UserError as error:  # the other arms need none
            self._settle(controller=None, no_controller=str(error))
            say(f"ppo     {self.point}no controller: {error}")

    def _distill(self) -> Iterator[Batch]:
        trials = self._trials([Arm(name=PPO)], "tuning")
        yield "openloop", trials, self._open("openloop")
        played, spec = self._summaries(trials), self._spec
        if self._open("openloop") and played:
            sites = [site.id for site in start_shape(spec, vocab_size=1).injection_specs()]
            entries = median_grafts(played, spec.budget.decisions, sites)
            write_json(self._openloop, [entry.model_dump(mode="json", exclude_none=True) for entry in entries])
            told = ", ".join(f"{entry.blueprint} at {entry.at:.0%}" for entry in entries)
            say(f"openloop {self.point}{told or 'no graft: the policy waits'}")
        if self._open("openloop"):
            self._settle(openloop=bool(played))

    def _trials(self, arms: Sequence[Arm], purpose: Purpose) -> list[Trial]:
        seeds = self._plan.seeds if purpose == "test" else self._plan.tuning_seeds
        return [self._trial(arm, purpose, seed) for arm in arms for seed in seeds]

    def _rate_trial(self, size: int, rate: float, seed: int) -> Trial:
        spec = with_rates(static_spec(self.point.spec, size), {size: rate})
        return Trial(Arm(name=STATIC, size=size), "rates", seed, self.point, spec, note=f"rate{rate:g}")

    def _trial(self, arm: Arm, purpose: Purpose, seed: int) -> Trial:
        spec, files, impossible = self._spec, {}, None
        try:
            spec, files = self._needs(arm, purpose, seed)
        except UserError as why:
            impossible = str(why)
        if arm.kind.anneals:
            spec = with_cooldowns(spec)
        inputs = ArmInputs(seed, blueprints=tuple(spec.growth.blueprints), **files)
        return Trial(arm, purpose, seed, self.point, spec, inputs, impossible=impossible)

    def _needs(self, arm: Arm, purpose: Purpose, seed: int) -> tuple[RunSpec, dict[str, Path]]:
        """The spec and the policy's files of an arm. Raises UserError where they cannot be had."""
        spec, leader = self._spec, {}
        if arm.of is not None:
            followed = self._trial(Arm(name=arm.of), purpose, seed)
            leader = self._log.summary(followed)
            if leader is None or leader["diverged"]:
                raise UserError(f"{arm.of} has no sound run of this seed to follow")
            if arm.kind.grows:
                return spec, {"match": self._log.folder(followed) / SUMMARY}
        if arm.size is not None:
            return static_spec(spec, arm.size), {}
        if arm.name == FINAL:
            return final_spec(spec, leader["shape"]), {}
        if arm.name == LRPATH:
            if self.settled.size is None:
                raise UserError("which static size is best is not known: it takes tuning seeds")
            return lrpath_spec(spec, self.settled.size, leader["val_curve"]), {}
        if arm.name == OPENLOOP:
            if not self.settled.openloop:
                raise UserError("the policy has no run on tuning seeds to take a schedule from")
            return spec, {"schedule": self._openloop}
        if arm.name == PPO:
            if self.settled.controller is None:
                raise UserError(f"there is no controller: {self.settled.no_controller}")
            return spec, {"policy": Path(self.settled.controller["checkpoint"])}
        return spec, {"schedule": self._inputs["schedule"]} if arm.kind.needs == "schedule" else {}

    @property
    def _spec(self) -> RunSpec:
        return with_rates(self.point.spec, self.settled.rates)

    @property
    def _openloop(self) -> Path:
        return self._log.out / f"openloop-{self.point.index}.json"

    def _open(self, field: str) -> bool:
        return field not in self.settled.model_fields_set

    def _settle(self, **values: Any) -> None:
        self.settled = self.settled.model_copy(update=values)

    def _summaries(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        return [summary for trial in trials if (summary := self._log.summary(trial)) is not None]

    def _losses(self, trials: Sequence[Trial]) -> list[float]:
        runs = [self._log.summary(trial) for trial in trials]
        return [math.inf if run is None or run["diverged"] else run["val_loss"] for run in runs]


def _best(arms: Sequence[Arm], losses: Mapping[Arm, float]) -> Arm | None:
    """The arm with the lowest loss; a single arm needs no loss to be chosen."""
    known = {arm: losses[arm] for arm in arms if math.isfinite(losses.get(arm, math.inf))}
    if known:
        return min(known, key=lambda arm: known[arm])
    return arms[0] if len(arms) == 1 else None
