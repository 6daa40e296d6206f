"""A sweep's stages: what is run after what, and what is settled in between.

1. rates: the learning rate of each static size, on tuning seeds (`--tune-lr`).
2. tuning: the best static size and the best schedule, on tuning seeds; then the controller is trained where one has to
   be, and its own runs on tuning seeds give `openloop` its schedule.
3. test: every arm that follows no other, on test seeds.
4. followers: those that need another arm's run of the same seed.

Every trial's result is in its folder, so a resumed sweep walks the same way and runs what is missing. What a stage has
settled stays settled (`settled.json`): trials that failed in it are not tried again, for the choice would change under
runs that rest on it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from esper.pipelines.controllers.evaluation import median_grafts
from esper.pipelines.sweeps.arm_names import FINAL, LRPATH, OPENLOOP, SCHEDULES
from esper.pipelines.sweeps.entrants import Entrant
from esper.pipelines.sweeps.grid import Point
from esper.pipelines.sweeps.log import SUMMARY, SweepLog
from esper.pipelines.sweeps.plan import Contestants
from esper.pipelines.sweeps.rate_search import ROUNDS, Curve, best_rate, bracketed, fitted_curve, next_rates
from esper.pipelines.sweeps.trial import (
    Purpose,
    Trial,
    final_spec,
    lrpath_spec,
    static_spec,
    trial_name,
    with_cooldowns,
)
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_json
from esper.policies.arms import ArmInputs
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.rate import stable_rate

RECORD = "settled.json"


class Settled(Frozen):
    """What a grid point's stages have settled.

    Attributes:
        rates: best rate by static size; None while nobody has looked for it.
        bracketed: whether each of them lies between two that were tried.
        curve: the rate by size that all other arms follow; None means the spec's own.
        size: the best static size; None where nobody has chosen.
        schedule: label of the best schedule, likewise.
        policy: the trained controller.
        no_policy: why there is none.
        openloop: file of its median schedule.
    """

    rates: dict[int, float] | None = None
    bracketed: bool = False
    curve: Curve | None = None
    size: int | None = None
    schedule: str | None = None
    policy: Path | None = None
    no_policy: str | None = None
    openloop: Path | None = None


Controller = Callable[[Point, RunSpec, Sequence[dict[str, Any]]], Path]
"""Gives a trained policy for a grid point: its spec with the rates found, and the summaries of its tuning runs."""


class Record(Frozen):
    """`settled.json`: which stages are over, and what each grid point has from them."""

    over: tuple[str, ...] = ()
    points: tuple[Settled, ...] = ()


@dataclass
class Stages:
    """Runs them.

    Args:
        contestants: who takes part.
        log: of the sweep.
        execute: runs trials; their results are in `log` afterwards.
        controller: trains one, where one has to be trained; None where it is given or not needed.
        keep: called after each stage.
    """

    contestants: Contestants
    log: SweepLog
    execute: Callable[[Sequence[Trial]], None]
    controller: Controller | None
    keep: Callable[[], None]
    settled: list[Settled] = field(default_factory=list)
    over: tuple[str, ...] = ()
    trials: dict[str, Trial] = field(default_factory=dict)
    impossible: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.contestants.files.policy
        self.settled = [Settled(policy=given) for _ in self.contestants.points]
        path = self.log.out / RECORD
        if path.exists():
            record = Record.checked(read_json(path, str(path), "what a sweep has settled"), str(path))
            self.settled, self.over = list(record.points), record.over

    def run(self) -> None:
        """Everything that is missing."""
        if self.contestants.tune_rates:
            self._find_rates()
        self._choose()
        self._train_controller()
        self._distill()
        alone = [entrant for entrant in self.contestants.entrants if not entrant.follows]
        self._do("test", [trial for p in self.contestants.points for trial in self._tests(p, alone)])
        following = [entrant for entrant in self.contestants.entrants if entrant.follows]
        self._do("follow", [trial for p in self.contestants.points for trial in self._tests(p, following)])

    # -- Stages ------------------------------------------------------------------------------------------------

    def _find_rates(self) -> None:
        points, sizes = self.contestants.points, self.contestants.sizes
        tried: dict[tuple[int, int], dict[float, list[float]]] = {(p.index, n): {} for p in points for n in sizes}
        for _ in range(ROUNDS):
            wanted = {key: next_rates(self._first_rate(points[key[0]], key[1]), tried[key]) for key in tried}
            trials = {
                (*key, rate): [self._rate_trial(points[key[0]], key[1], rate, seed) for seed in self._tuning()]
                for key, rates in wanted.items()
                for rate in rates
            }
            if not trials:
                break
            self._do("rates", [trial for group in trials.values() for trial in group], again="rates" not in self.over)
            for (index, size, rate), group in trials.items():
                tried[index, size][rate] = [self._loss(trial) for trial in group]
        for point in points:
            if "rates" not in self.over:
                best = {size: best_rate(tried[point.index, size]) for size in sizes}
                self._settle(
                    point,
                    rates=best,
                    bracketed=all(bracketed(tried[point.index, size]) for size in sizes),
                    curve=fitted_curve({_parameters(point.spec, size): rate for size, rate in best.items()}),
                )
            settled = self.settled[point.index]
            assert settled.rates is not None
            assert settled.curve is not None
            found = ", ".join(f"{rate:g} at {size} layer(s)" for size, rate in settled.rates.items())
            say(f"rates   {_at(point)}{found}; growing arms: {_told(settled.curve)}")
        self._end("rates")

    def _choose(self) -> None:
        """The best size and the best schedule."""
        c = self.contestants
        several = [group for group in (c.statics(), c.schedules()) if len(group) > 1]
        several = several if self._tuning() else []
        entrants = [entrant for group in several for entrant in group]
        trials = {(p.index, e): self._trials(p, e, "tuning", self._tuning()) for p in c.points for e in entrants}
        self._do("tuning", [trial for group in trials.values() for trial in group], again="tuning" not in self.over)
        for point in c.points:
            if "tuning" not in self.over:
                losses = {e: fmean(map(self._loss, trials[point.index, e])) for e in entrants}
                self._settle(
                    point,
                    size=self._best(c.statics(), losses, lambda entrant: entrant.size),
                    schedule=self._best(c.schedules(), losses, lambda entrant: entrant.label),
                )
            settled = self.settled[point.index]
            if entrants:
                what = [f"{settled.size} layer(s)"] + ([f"schedule {settled.schedule}"] if settled.schedule else [])
                say(f"tuning  {_at(point)}best: {', '.join(what)}")
        self._end("tuning")

    def _train_controller(self) -> None:
        if self.controller is None or "controller" in self.over:
            return
        for point in self.contestants.points:
            tuning = [
                summary
                for entrant in self.contestants.statics()
                for trial in self._trials(point, entrant, "tuning", self._tuning())
                if (summary := self.log.summary(trial)) is not None and not summary["diverged"]
            ]
            try:
                self._settle(point, policy=self.controller(point, self._spec(point), tuning))
            except UserError as error:  # the other arms need none
                self._settle(point, no_policy=str(error))
                say(f"ppo     {_at(point)}no controller: {error}")
        self._end("controller")

    def _distill(self) -> None:
        """The policy's median schedule, from its own runs on tuning seeds."""
        c = self.contestants
        if not c.has(OPENLOOP):
            return
        trials = {p.index: self._trials(p, Entrant("ppo"), "tuning", self._tuning()) for p in c.points}
        self._do("tuning", [trial for group in trials.values() for trial in group], again=OPENLOOP not in self.over)
        for point in c.points if OPENLOOP not in self.over else ():
            played = [summary for trial in trials[point.index] if (summary := self.log.summary(trial)) is not None]
            if not played:
                continue
            spec = self._spec(point)
            sites = [site.id for site in start_shape(spec, vocab_size=1).injection_specs()]
            entries = median_grafts(played, spec.budget.decisions, sites)
            path = self.log.out / f"openloop-{point.index}.json"
            write_json(path, [entry.model_dump(mode="json", exclude_none=True) for entry in entries])
            self._settle(point, openloop=path)
            told = ", ".join(f"{entry.blueprint} at {entry.at:.0%}" for entry in entries)
            say(f"openloop {_at(point)}{told or 'no graft: the policy waits'}")
        self._end(OPENLOOP)

    # -- Trials ------------------------------------------------------------------------------------------------

    def _tests(self, point: Point, entrants: Sequence[Entrant]) -> list[Trial]:
        return [trial for entrant in entrants for trial in self._trials(point, entrant, "test", self.contestants.seeds)]

    def _trials(self, point: Point, entrant: Entrant, purpose: Purpose, seeds: Sequence[int]) -> list[Trial]:
        """An entrant's trials; those that cannot be are noted as failures."""
        trials = []
        for seed in seeds:
            made = self._trial(point, entrant, purpose, seed)
            if isinstance(made, Trial):
                trials.append(made)
            else:
                name = trial_name(entrant, seed, point, several=self.contestants.several)
                tags = {"label": entrant.label, "arm": entrant.arm, "size": None, "seed": seed, "grid": point.grid}
                self.impossible[name] = {**tags, "purpose": purpose, "status": "failed", "error": made}
        return trials

    def _trial(self, point: Point, entrant: Entrant, purpose: Purpose, seed: int) -> Trial | str:
        settled, spec, files = self.settled[point.index], self._spec(point), self.contestants.files
        inputs = ArmInputs(seed, settled.policy, files.schedule, blueprints=tuple(spec.growth.blueprints))
        followed: dict[str, Any] = {}
        if entrant.arm == "ppo" and settled.policy is None:
            return f"there is no controller: {settled.no_policy}"
        if entrant.of is not None:
            leader = self._trial(point, Entrant(entrant.of), purpose, seed)
            found = self.log.summary(leader) if isinstance(leader, Trial) else None
            if found is None or found["diverged"]:
                return f"{entrant.of} has no sound run of this seed to follow"
            followed = found
            assert isinstance(leader, Trial)
            if entrant.arm == "random":
                inputs = ArmInputs(seed, match=self.log.folder(leader) / SUMMARY, blueprints=inputs.blueprints)
        if entrant.arm == "static":
            assert entrant.size is not None
            spec = static_spec(spec, entrant.size, (settled.rates or {}).get(entrant.size))
        elif entrant.arm == FINAL:
            spec = final_spec(spec, followed["shape"])
        elif entrant.arm == LRPATH:
            if settled.size is None:
                return "which static size is best is not known: it takes tuning seeds"
            spec = lrpath_spec(spec, settled.size, followed["val_curve"])
        elif entrant.arm == OPENLOOP:
            if settled.openloop is None:
                return "the policy has no run on tuning seeds to take a schedule from"
            inputs = ArmInputs(seed, schedule=settled.openloop, blueprints=inputs.blueprints)
        if entrant.arm in ("static", FINAL, *SCHEDULES):
            spec = with_cooldowns(spec)
        return self._made(entrant, purpose, seed, point, spec, inputs)

    def _rate_trial(self, point: Point, size: int, rate: float, seed: int) -> Trial:
        spec = static_spec(point.spec, size, rate)
        return self._made(Entrant("static", size), "rates", seed, point, spec, ArmInputs(seed), note=f"rate{rate:g}")

    def _made(
        self,
        entrant: Entrant,
        purpose: Purpose,
        seed: int,
        point: Point,
        spec: RunSpec,
        inputs: ArmInputs,
        note: str = "",
    ) -> Trial:
        return Trial(entrant, purpose, seed, point, spec, inputs, note=note, several=self.contestants.several)

    def _do(self, stage: str, trials: Sequence[Trial], *, again: bool = True) -> None:
        """Run those that are missing, unless what they were for is settled."""
        self.trials |= {trial.name: trial for trial in trials}
        missing = self.log.missing(trials)
        if missing and again:
            self.log.begin(stage, missing)
            self.execute(missing)
            self.keep()

    # -- Helpers -----------------------------------------------------------------------------------------------

    def _settle(self, point: Point, **values: Any) -> None:
        self.settled[point.index] = self.settled[point.index].model_copy(update=values)

    def _end(self, stage: str) -> None:
        """A stage is over: what it has settled stays."""
        if stage not in self.over:
            self.over = (*self.over, stage)
            record = Record(over=self.over, points=tuple(self.settled))
            write_json(self.log.out / RECORD, record.model_dump(mode="json"))
        self.keep()

    def _tuning(self) -> Sequence[int]:
        return self.contestants.tuning_seeds

    def _spec(self, point: Point) -> RunSpec:
        """A point's, with the rate by size that was found."""
        curve = self.settled[point.index].curve
        return point.spec if curve is None else point.spec.overridden(curve.as_values())

    @staticmethod
    def _first_rate(point: Point, size: int) -> float:
        return stable_rate(point.spec.optimizer, _parameters(point.spec, size))

    def _loss(self, trial: Trial) -> float:
        summary = self.log.summary(trial)
        return math.inf if summary is None or summary["diverged"] else summary["val_loss"]

    @staticmethod
    def _best(entrants: Sequence[Entrant], losses: dict[Entrant, float], name: Callable[[Entrant], Any]) -> Any:
        """The name of the one with the lowest loss; of a single one without a look."""
        known = {entrant: losses[entrant] for entrant in entrants if math.isfinite(losses.get(entrant, math.inf))}
        if known:
            return name(min(known, key=lambda entrant: known[entrant]))
        return name(entrants[0]) if len(entrants) == 1 else None


def _parameters(spec: RunSpec, size: int) -> int:
    """Non-embedding parameters of a static size."""
    return start_shape(static_spec(spec, size), vocab_size=1).parameters_count(non_embedding=True)


def _at(point: Point) -> str:
    return f"{point.grid}: " if point.values else ""


def _told(curve: Curve) -> str:
    return f"{curve.learning_rate:g}·(N/{curve.rate_parameters:,})^-{curve.rate_exponent:g}"
