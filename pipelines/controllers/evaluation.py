"""Evaluates a trained controller: every arm plays every instance once, from the same seeds."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.pipelines.common.play import play
from esper.pipelines.common.statistics import Interval
from esper.platform.console import Eta, duration, say
from esper.platform.contracts import GrowthPolicy, Instance
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec
from esper.policies.arms import ArmInputs, make_policy
from esper.policies.schedule import Entry, SchedulePolicy
from esper.policies.simic.distill import Taken, median_schedule
from esper.policies.simic.policy import SimicPolicy
from esper.workers.laws.best_schedule import best_fixed_schedule
from esper.workers.laws.oracle import bound
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.probe import ChargedProbe
from esper.workers.run import GrowthRun

TRAINED, BOUND = "ppo", "bound"  # the rows of the policy itself and of the oracle's bound
TOLD_EVERY = 5.0  # seconds between two lines of progress
REACHED = ("val_loss", "diverged", "parameters", "decisions", "parameter_seconds", "tokens")

Summaries = list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """The instances and runs on which arms are compared."""

    spec: RunSpec  # what is played
    instances: Mapping[int, Instance]  # id → instance
    make_run: Callable[[], GrowthRun | SurrogateRun]  # makes the run that an arm plays on
    seed: int = 0  # from which each instance's own is derived, whatever the arm

    def seed_of(self, id: int) -> int:
        """The seed of an instance's episodes, the same for all arms."""
        return derive(self.seed, "evaluate", id)

    def play(self, arm: str, make_policy: Callable[[int], GrowthPolicy]) -> Summaries:
        """An arm's summary per instance; `make_policy` makes its controller from an episode's seed."""
        run = self.make_run()

        def episode(id: int) -> dict[str, Any]:
            run.reset(self.instances[id], self.seed_of(id))
            return play(run, make_policy(self.seed_of(id)), arm=arm, probe=ChargedProbe(run))

        return self._each(arm, episode)

    def bounds(self) -> np.ndarray:
        """The oracle's lowest loss per instance, nats, float64 (instances,)."""
        return np.array(self._each(BOUND, lambda id: bound(self.spec, self.instances[id], seed=self.seed_of(id))))

    def best_schedule(self) -> list[Entry]:
        """The fixed schedule with the lowest mean loss here, by local search on loss laws."""
        found = best_fixed_schedule(self.spec, self.instances.values())
        return [Entry(at=at, blueprint=blueprint) for at, blueprint in found]

    def median_schedule(self, policy: SimicPolicy) -> tuple[list[Entry], Summaries]:
        """The median schedule of a policy's episodes here, and their summaries."""
        shallow = min(self.instances, key=lambda id: self.instances[id].n_layer or self.spec.host.n_layer)
        sites = self.make_run().reset(self.instances[shallow], self.seed_of(shallow)).site_ids
        played = self.play(TRAINED, lambda seed: policy)
        return median_grafts(played, self.spec.budget.decisions, set(sites)), played

    def _each(self, what: str, of: Callable[[int], Any]) -> list[Any]:
        """`of` each instance, printing progress."""
        found, eta, told = [], Eta(), time.perf_counter()
        for done, id in enumerate(self.instances):
            if time.perf_counter() - told >= TOLD_EVERY:
                told = time.perf_counter()
                say(f"  {what}: {done} of {len(self.instances)}, {eta.left(done / len(self.instances))} left")
            found.append(of(id))
        return found


@dataclass(frozen=True)
class Comparison:
    """Results of arms on the same instances."""

    played: dict[str, Summaries]  # arm → a summary per instance
    schedules: dict[str, list[Entry]]  # of the arms that play one
    bounds: np.ndarray | None = None  # float64 (instances,), nats; None where unknown

    @property
    def reference(self) -> str | None:
        """The arm that the others are compared with."""
        return next((arm for arm in ("schedule", "static") if arm in self.played), None)

    def rows(self) -> list[dict[str, Any]]:
        """A row per arm, then the bound: mean `loss`, `to_bound` and paired `difference` to the reference, in nats.

        `closed` is the share of the gap between reference and bound, `grafts` a mean per episode, `diverged` a count.
        """
        losses = {arm: np.array([run["val_loss"] for run in runs]) for arm, runs in self.played.items()}
        bounds, reference = self.bounds, losses.get(self.reference or "")
        gap = 0.0 if bounds is None or reference is None else float((reference - bounds).mean())
        rows = []
        for arm, reached in (losses if bounds is None else losses | {BOUND: bounds}).items():
            runs = self.played.get(arm)
            apart = None if reference is None or arm == self.reference else Interval.of(reached - reference)
            row = {
                "arm": arm,
                "loss": float(reached.mean()),
                "to_bound": None if bounds is None or arm == BOUND else float((reached - bounds).mean()),
                "difference": apart,
                "closed": float((reference - reached).mean()) / gap if reference is not None and gap > 0 else None,
                "grafts": None if runs is None else float(np.mean([len(run["grafts"]) for run in runs])),
                "diverged": sum(run["diverged"] for run in runs or ()),
            }
            rows.append(row)
        return rows

    def table(self) -> str:
        """The rows as text, without empty columns."""
        import pandas

        names = {"loss": "mean final loss", "to_bound": "to the bound", "closed": "gap closed"}
        names["difference"] = f"against {self.reference}"
        forms = {"loss": "{:.4f}", "to_bound": "{:.4f}", "closed": "{:.0%}", "grafts": "{:.1f}"}
        frame = pandas.DataFrame(self.rows()).replace({"diverged": {0: None}}).dropna(axis="columns", how="all")
        for column in frame:
            form = forms.get(column, "{}")
            frame[column] = ["" if pandas.isna(value) else form.format(value) for value in frame[column]]
        return frame.rename(columns=names).to_string(index=False)

    def reached(self, i: int) -> dict[str, Any]:
        """The result of each arm on the i-th instance, and its bound, as JSON values."""
        arms = {arm: _reached(runs[i]) for arm, runs in self.played.items()}
        return {BOUND: None if self.bounds is None else float(self.bounds[i]), "arms": arms}


def compare(
    arms: Sequence[str],
    policy: SimicPolicy,
    on: Evaluation,
    training: Evaluation | None,
    given: Mapping[str, list[Entry]],
) -> Comparison:
    """Play arms and the policy. Schedules not `given` are chosen on `training`, which is None on text."""
    played, schedules, bounds = {}, dict(given), None

    def schedule(arm: str) -> list[Entry]:
        assert training is not None
        say(f"  {arm}: choosing on {len(training.instances)} training instances")
        return training.best_schedule() if arm == "schedule" else training.median_schedule(policy)[0]

    for arm in (*arms, TRAINED):
        begun = time.perf_counter()
        if arm == BOUND:
            bounds = on.bounds()
        elif arm == TRAINED:
            played[arm] = on.play(arm, lambda seed: policy)
        elif arm in ("schedule", "openloop"):
            entries = schedules[arm] = schedules[arm] if arm in schedules else schedule(arm)
            played[arm] = on.play(arm, lambda seed, entries=entries: SchedulePolicy(entries))
        else:
            played[arm] = on.play(arm, lambda seed, arm=arm: make_policy(arm, ArmInputs(seed)))
        say(f"  {arm}: {duration(time.perf_counter() - begun)}")
    return Comparison(played, schedules, bounds)


def median_grafts(summaries: Iterable[dict[str, Any]], decisions: int, sites: Collection[str]) -> list[Entry]:
    """The median schedule of runs, from their summaries."""
    episodes = [
        [Taken(graft["budget_fraction"], graft["blueprint"], graft["site"]) for graft in summary["grafts"]]
        for summary in summaries
    ]
    return median_schedule(episodes, decisions, sites)


def _reached(summary: dict[str, Any]) -> dict[str, Any]:
    grafts = [
        {"at": graft["budget_fraction"], "blueprint": graft["blueprint"], "site": graft["site"]}
        for graft in summary["grafts"]
    ]
    return {**{key: summary[key] for key in REACHED}, "grafts": grafts, "prunes": len(summary["prunes"])}
