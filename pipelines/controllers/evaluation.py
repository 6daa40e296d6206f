"""Plays arms on instances: every arm every instance once, from the same seeds; and what comes of it as a schedule."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from esper.pipelines.common.play import play
from esper.platform.contracts import GrowthPolicy, Instance
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec
from esper.policies.schedule import Entry
from esper.policies.simic.distill import median_schedule
from esper.workers.laws.oracle import best_fixed_schedule, bound
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.run import GrowthRun

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
        run, found, console = self.make_run(), [], Console(stderr=True)
        for id in track(self.instances, arm, console=console, transient=True, disable=not sys.stderr.isatty()):
            run.reset(self.instances[id], self.seed_of(id))
            found.append(play(run, make_policy(self.seed_of(id)), arm=arm))
        return found

    def bounds(self) -> np.ndarray:
        return np.array([bound(self.spec, self.instances[id], seed=self.seed_of(id)) for id in self.instances])

    def best_schedule(self) -> list[Entry]:
        """The fixed schedule with the lowest mean loss here, by local search on loss laws."""
        found = best_fixed_schedule(self.spec, self.instances.values())
        return [Entry(at=at, blueprint=blueprint) for at, blueprint in found]

    def median_schedule(self, policy: GrowthPolicy) -> tuple[list[Entry], Summaries]:
        """The median schedule of a policy's episodes here, and their summaries."""
        shallow = min(self.instances, key=lambda id: self.instances[id].n_layer or self.spec.host.n_layer)
        sites = self.make_run().reset(self.instances[shallow], self.seed_of(shallow)).site_ids
        played = self.play("ppo", lambda seed: policy)
        return median_schedule(played, self.spec.budget.decisions, set(sites)), played


def as_json(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """A schedule as `policies/schedule.py` reads it."""
    return [entry.model_dump(mode="json", exclude_none=True) for entry in entries]
