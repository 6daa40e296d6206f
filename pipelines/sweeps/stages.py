"""A sweep's stages: what is run after what, and what is settled in between.

1. rates: the learning rate and its decay, of each static size, then of what grows, on tuning seeds (`--tune-lr`).
2. tuning: the best static size and schedule, on tuning seeds; then the controller and its schedule for `openloop`. With
   `--sizes auto`, 1 and 2 take turns for the sizes, until the best has no better neighbour.
3. test: every arm that follows no other, on test seeds; of sizes found by `auto`, the best and its neighbours.
4. follow: those that need another arm's run of the same seed.

A resumed sweep walks the same way and runs what is missing. What is settled stays settled, also where trials for it
failed: a new choice would change under runs that rest on it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

from pydantic import Field

from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.sweeps import search
from esper.pipelines.sweeps.arms import LRPATH, OPENLOOP, PPO, RANDOM, SCHEDULES, STATIC, Arm, policy_input
from esper.pipelines.sweeps.log import SUMMARY, SweepLog
from esper.pipelines.sweeps.plan import Point, Purpose, SweepPlan, Trial
from esper.pipelines.sweeps.search import Setting
from esper.pipelines.sweeps.sizes import Size, born, lrpath_spec, with_rates
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.ledger import AXES
from esper.platform.provenance import PINS
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_json
from esper.policies.arms import ArmInputs, make_policy
from esper.policies.schedule import SchedulePolicy, as_json, median_schedule
from esper.workers.laws.fit import annealed_losses, fit_laws
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.rate import stable_rate

Inputs = Mapping[str, Path]  # the files that were given
Batch = tuple[str, list[Trial], bool]  # a stage, its trials, and whether to run missing ones: not once it is settled
TRAINING_SEED = 1_000_000  # controllers are trained on seeds that no arm is compared on
COOLDOWNS = (0.3, 0.6)  # budget fractions of the annealed losses that baselines need on other axes than the budget's


class Settled(Frozen, extra="ignore"):
    """What is settled for a grid point (its entry in `sweep.json`); a field that has not been set is open."""

    settings: dict[str, Setting] = Field(default={})  # by label; a growing arm's rate is a factor on the sizes'
    bracketed: bool = False  # the rate of each static size lies between two others that were tried
    sizes: list[list[str]] = Field(default=[])  # that `--sizes auto` tried, step by step; it ends with an empty one
    size: str | None = None  # the best static one; None where nobody could choose
    schedule: str | None = None  # label of the best one, likewise
    controller: dict[str, Any] | None = None  # `trained_on`, `checkpoint` and what it has `spent`, if there is one
    openloop: bool = False  # its median schedule is known


def static_arms(sizes: Iterable[Size], spec: RunSpec) -> list[Arm]:
    """From small to large."""
    return [Arm(name=STATIC, size=size) for size in sorted(sizes, key=lambda size: (size.parameters(spec), str(size)))]


class PointStages:
    """The stages of one grid point; `settled` holds the fields of `Settled` that are not open."""

    def __init__(
        self, folder: RunFolder, plan: SweepPlan, point: Point, settled: Settled, inputs: Inputs, log: SweepLog
    ) -> None:
        self.point, self.settled = point, settled.model_dump(exclude_unset=True)
        self.controller = folder.out / (f"ppo-{point.trains}" if point.several else "ppo")  # where it is trained
        self.trainer, self.failed = self, ""  # of the point that trains it; why that could not, until a resume
        self._folder, self._plan, self._inputs, self._log = folder, plan, inputs, log
        self._openloop = folder.out / f"openloop-{point.index}.json"
        self.statics = [] if plan.search_sizes else static_arms(plan.sizes, point.spec)
        if "policy" in inputs:
            self.settled["controller"] = {"checkpoint": str(inputs["policy"]), "trained_on": "given"}

    def choices(self) -> Iterator[Batch]:
        """The trials on tuning seeds, batch by batch; run each batch before asking for the next."""
        arms = self._plan.arms
        if self._plan.search_sizes:
            yield from self._find_sizes()
        if self._plan.tune_lr:
            if not self._plan.search_sizes:
                yield from self._find_settings(self.statics)
            free = [arm for arm in arms if arm.of is None and arm.name not in (STATIC, OPENLOOP)]
            yield from self._find_settings([arm for arm in free if arm != Arm(name=PPO)])
        yield from self._choose()
        if Arm(name=PPO) in arms and not self.settled.get("controller"):
            if self.trainer is self:
                self._train_controller()
            while not (self.trainer.failed or self.trainer.settled.get("controller")):
                yield "controller", [], False
            self.settled["controller"] = self.trainer.settled.get("controller")
        if Arm(name=PPO) in arms and self._plan.tune_lr and self.settled.get("controller"):
            yield from self._find_settings([Arm(name=PPO)])
        if Arm(name=OPENLOOP) in arms:
            yield from self._distill()

    def tests(self, seeds: Sequence[int]) -> Iterator[Batch]:
        """The trials on these test seeds, likewise."""
        arms = [arm for arm in self._plan.arms if arm.name != STATIC]
        if len(arms) < len(self._plan.arms):
            arms = [*self._tested(), *arms]
        yield "test", self._trials([arm for arm in arms if arm.of is None], "test", seeds), True
        yield "follow", self._trials([arm for arm in arms if arm.of is not None], "test", seeds), True

    def record(self) -> dict[str, Any]:
        """Its entry in `sweep.json`."""
        spec = self.point.spec.model_dump(mode="json")
        budget = {key: spec["budget"][key] for key in ("axis", "amount")}
        return {"grid": self.point.grid, "budget": budget, "spec": spec, "spent": self._spent(), **self.settled}

    def _spent(self) -> dict[str, Any]:
        """What tuning trials and the controller have used on each ledger axis, by purpose."""
        parts: dict[str, dict[str, float]] = {name: dict.fromkeys(map(str, AXES), 0.0) for name in ("rates", "tuning")}
        for trial in self._log.trials.values():
            summary = self._log.summary(trial)
            if trial.point is self.point and trial.purpose in parts and summary is not None:
                for axis, used in cost(trial.spec, summary).items():
                    parts[trial.purpose][axis] += used
        controller = self.settled.get("controller")
        return parts | ({"controller": controller.get("spent")} if controller else {})

    def _tested(self) -> list[Arm]:
        if not self._plan.search_sizes or self.settled["size"] is None:
            return self.statics
        best = Size.of(self.settled["size"])
        near = [best, *chain.from_iterable(search.neighbours(self.point.spec, best))]
        return [arm for arm in self.statics if arm.size in near]

    def _find_sizes(self) -> Iterator[Batch]:
        """Steps of the search; those before are taken again as they were, whatever was lost of their trials."""
        spec, losses, steps = self.point.spec, dict[Size, float](), self.settled.setdefault("sizes", [])
        for number in count():
            if number == len(steps):
                steps.append([str(size) for size in search.next_sizes(spec, losses)])
            if not steps[number]:
                return
            new = static_arms(map(Size.of, steps[number]), spec)
            self.statics = static_arms([arm.size for arm in (*self.statics, *new) if arm.size], spec)
            if self._plan.tune_lr:
                scale = 1.0
                if losses:  # the best size's rate was found to be so many times the preset's
                    best = search.best_size(losses)
                    tuned = self.settled["settings"][f"{STATIC}-{best}"][0]
                    scale = tuned / stable_rate(spec.optimizer, best.parameters(spec))
                yield from self._find_settings(new, scale)
            trials = self._trials(new, "tuning")
            yield "tuning", trials, "size" not in self.settled
            losses |= {arm.size: fmean(self._losses([t for t in trials if t.arm == arm])) for arm in new if arm.size}

    def _find_settings(self, arms: Sequence[Arm], scale: float = 1.0) -> Iterator[Batch]:
        spec, optimizer, known = self.point.spec, self.point.spec.optimizer, self.settled.get("settings", {})
        still_open = any(arm.label not in known for arm in arms)
        decays = {arm: self._decays(arm) for arm in arms}
        tried: dict[Arm, dict[Setting, list[float]]] = {arm: {} for arm in arms}
        starts = {a: scale * stable_rate(optimizer, a.size.parameters(spec)) if a.size else 1.0 for a in arms}
        for _ in range(search.ROUNDS):
            new = [
                (a, next_) for a, done in tried.items() for next_ in search.next_settings(starts[a], decays[a], done)
            ]
            if not new:
                break
            seeds = self._plan.tuning_seeds
            groups = [[self._trial(arm, "rates", seed, setting) for seed in seeds] for arm, setting in new]
            yield "rates", [trial for group in groups for trial in group], still_open
            for (arm, setting), group in zip(new, groups, strict=True):
                tried[arm][setting] = self._losses(group)
        if still_open:
            self.settled["settings"] = known | {arm.label: search.best_setting(losses) for arm, losses in tried.items()}
            if arms and all(arm.size for arm in arms):
                self.settled["bracketed"] = self.settled.get("bracketed", True) and all(
                    map(search.bracketed, tried.values())
                )
        told = [f"{arm.label} {'×' * (not arm.size)}{self.settled['settings'][arm.label]}" for arm in arms]
        if told:
            say(f"rates   {self.point}{', '.join(told)}")

    def _decays(self, arm: Arm) -> Sequence[float]:
        """Where an arm's rate may start to fall: after the last graft of its schedule, for then none is legal."""
        spec, last = self.point.spec, self.point.spec.optimizer.warmup
        if "optimizer.decay_from" in (*self._plan.own, *self.point.values):
            return [spec.optimizer.decay_from]
        if arm.name in SCHEDULES:
            policy = make_policy(arm.name, ArmInputs(spec=spec, schedule=self._inputs.get("schedule")))
            due = [entry.at for entry in policy.entries] if isinstance(policy, SchedulePolicy) else []
            last = max([last, *(math.ceil(at * spec.budget.decisions) / spec.budget.decisions for at in due)])
        return [decay for decay in search.DECAYS if decay > last] or [spec.optimizer.decay_from]

    def _choose(self) -> Iterator[Batch]:
        schedules = [arm for arm in self._plan.arms if arm.name in SCHEDULES]
        trials = self._trials([arm for group in (self.statics, schedules) if len(group) > 1 for arm in group], "tuning")
        if trials:
            yield "tuning", trials, "size" not in self.settled
        if "size" not in self.settled:
            size, schedule = self._best(self.statics, trials), self._best(schedules, trials)
            self.settled |= {"size": size and str(size.size), "schedule": schedule and schedule.label}
        if trials:
            size, schedule = self.settled["size"], self.settled["schedule"]
            tried = f" of {len(self.statics)} tried" if self._plan.search_sizes else ""
            say(f"tuning  {self.point}best static size: {size}{tried}" + f", schedule: {schedule}" * bool(schedule))

    def _train_controller(self) -> None:
        """Train it, or go on: on text, or in minutes on loss laws (zero-shot on text then)."""
        from esper.pipelines.controllers.training import ON_LAWS, train_controller  # RLlib takes seconds to import

        out, plan, spec, laws = self.controller, self._plan, self._spec(Arm(name=PPO)), self._plan.train_on == "laws"
        try:
            if not (out / PINS).exists():
                if laws:
                    spec = spec.overridden({key: value for key, value in ON_LAWS.items() if key not in plan.own})
                    spec = self._with_laws(spec)
                values = {"out": out, "spec": spec, "data": None if laws else self._folder.data, "key": uuid4().hex}
                own = self._folder.model_copy(update={**values, "seed": TRAINING_SEED + self._folder.seed})
                with own.begin("ppo"):
                    pass  # pinned
            with RunFolder.reopen(out, "ppo") as own:
                own.check()
                if not own.ended:
                    train_controller(own, parent=self._log.parent, check=self._log.check)
            summary = read_json(out / SUMMARY, str(out / SUMMARY), "the summary of a controller's training")
            known = {"checkpoint": summary["checkpoint"], "trained_on": plan.train_on, "spent": summary["spent"]}
            self.settled["controller"] = known
        except UserError as error:  # the other arms need none
            self.failed = str(error)
            say(f"ppo     {self.point}no controller: {error}")

    def _with_laws(self, spec: RunSpec) -> RunSpec:
        runs = self._summaries(self._trials(self.statics, "tuning"))
        fit = fit_laws(spec, [annealed_losses(run) for run in runs])
        law = ", ".join(f"{name} {value:.3g}" for name, value in asdict(fit.law).items())
        say(f"laws    {law}; off by {fit.residual:.4f} nats (rms) from the static runs on tuning seeds")
        return spec.model_copy(update={"laws": fit.laws})

    def _distill(self) -> Iterator[Batch]:
        trials, still_open = self._trials([Arm(name=PPO)], "tuning"), "openloop" not in self.settled
        yield "openloop", trials, still_open
        if not still_open:
            return
        if played := self._summaries(trials):
            sites = [site.id for site in start_shape(self.point.spec, vocab_size=1).injection_specs()]
            entries = median_schedule(played, self.point.spec.budget.decisions, sites)
            write_json(self._openloop, as_json(entries))
            told = ", ".join(f"{entry.blueprint} at {entry.at:.0%}" for entry in entries)
            say(f"openloop {self.point}{told or 'no graft: the policy waits'}")
            self.settled["openloop"] = True

    def _trials(self, arms: Sequence[Arm], purpose: Purpose, seeds: Sequence[int] | None = None) -> list[Trial]:
        own = self._plan.tuning_seeds if seeds is None else seeds
        return [self._trial(arm, purpose, seed) for arm in arms for seed in own]

    def _trial(self, arm: Arm, purpose: Purpose, seed: int, setting: Setting | None = None) -> Trial:
        spec, files, impossible = self._spec(arm, setting), {}, None
        try:
            spec, files = self._needs(arm, purpose, seed, spec)
        except UserError as why:
            impossible = str(why)
        if arm.kind.anneals and setting is None and "budget.cooldowns" not in (*self._plan.own, *self.point.values):
            spec = spec.overridden({"budget.cooldowns": spec.budget.cooldowns or COOLDOWNS})
        inputs, note = ArmInputs(seed, spec=spec, **files), ""
        if setting is not None:
            note = f"rate{setting.rate:g}-decay{setting.decay_from:g}"
        return Trial(arm, purpose, seed, self.point, spec, inputs, note, impossible)

    def _needs(self, arm: Arm, purpose: Purpose, seed: int, spec: RunSpec) -> tuple[RunSpec, dict[str, Path]]:
        """The spec and the policy's files of an arm. Raises UserError where they cannot be had."""
        if arm.of is not None:
            followed = self._trial(Arm(name=arm.of), purpose, seed)
            leader = self._log.summary(followed)
            if leader is None or leader["diverged"]:
                raise UserError(f"{arm.of} has no sound run of this seed to follow")
            if arm.kind.grows:
                return spec, {"match": self._log.folder(followed) / SUMMARY}
            if arm.name != LRPATH:
                return born(spec, leader["shape"]), {}
            if self.settled["size"] is None:
                raise UserError("which static size is best is not known: it takes tuning seeds")
            return lrpath_spec(spec, Size.of(self.settled["size"]), leader["val_curve"]), {}
        if arm.name == OPENLOOP:
            if not self.settled.get("openloop"):
                raise UserError("the policy has no run on tuning seeds to take a schedule from")
            return spec, {"schedule": self._openloop}
        if arm.policy:
            return spec, {"policy": self._inputs[policy_input(arm.policy)]}
        if arm.name == PPO:
            if not self.settled.get("controller"):
                raise UserError(f"there is no controller: {self.trainer.failed}")
            return spec, {"policy": Path(self.settled["controller"]["checkpoint"])}
        need = arm.kind.needs
        return spec, {need: self._inputs[need]} if need else {}

    def _spec(self, arm: Arm, setting: Setting | None = None) -> RunSpec:
        """An arm's spec under a setting, or under the best that was found for it or for the arm that it follows.

        Where there is none, as for a shape from scratch, the rate follows the static sizes' and falls as the best's.
        """
        spec, known = self.point.spec, self.settled.get("settings", {})
        leader = {RANDOM: arm.of, LRPATH: arm.of, OPENLOOP: PPO}.get(arm.name)
        best = known.get(f"{STATIC}-{self.settled.get('size')}")
        setting = setting or known.get(leader or arm.label) or (best and Setting(1.0, best[1]))
        if setting is not None:
            rate, decay_from = setting
            sizes = [(each.size, rate * known[each.label][0]) for each in self.statics if each.size and not arm.size]
            spec = with_rates(spec, [(arm.size, rate)] if arm.size else sizes)
            spec = spec.overridden({"optimizer.decay_from": decay_from})
        return arm.size.born(spec) if arm.size else spec

    def _summaries(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        return [summary for trial in trials if (summary := self._log.summary(trial)) is not None]

    def _losses(self, trials: Sequence[Trial]) -> list[float]:
        runs = [self._log.summary(trial) for trial in trials]
        return [math.inf if run is None or run["diverged"] else run["val_loss"] for run in runs]

    def _best(self, arms: Sequence[Arm], trials: Sequence[Trial]) -> Arm | None:
        """The arm with the lowest mean loss; a single arm needs no loss to be chosen."""
        losses = {arm: self._losses([trial for trial in trials if trial.arm == arm]) for arm in arms}
        means = {arm: fmean(own) for arm, own in losses.items() if own and math.isfinite(sum(own))}
        return min(means, key=means.__getitem__, default=arms[0] if len(arms) == 1 else None)


def cost(spec: RunSpec, summary: Mapping[str, Any]) -> dict[str, float]:
    """What a run has used on each ledger axis, with its cooldown forks, which are not charged to the run."""
    used = {axis: summary[axis] for axis in AXES}
    for at, fork in zip(spec.budget.cooldowns, summary["annealed"], strict=False):
        begun = at * spec.optimizer.decay_from
        start = next(point for point in summary["val_curve"] if point["budget_fraction"] >= begun)
        used = {axis: used[axis] + fork[axis] - start[axis] for axis in AXES}
    return used
