"""Playing an arm on an instance set: every instance once, from a seed of its own that is the same for all arms."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.pipelines.common.play import play
from esper.platform.console import Eta, say
from esper.platform.contracts import GrowthPolicy, Instance
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.probe import ChargedProbe
from esper.workers.run import GrowthRun

TOLD_EVERY = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Played:
    """What an arm reached.

    Attributes:
        arm: its name.
        summaries: id of the instance → the episode's summary, in the set's order.
    """

    arm: str
    summaries: dict[int, dict[str, Any]]

    def losses(self) -> np.ndarray:
        """Final validation losses, nats per token, float64 (instances,)."""
        return np.array([summary["val_loss"] for summary in self.summaries.values()])

    def grafts(self) -> list[int]:
        """How many grafts each episode has."""
        return [len(summary["grafts"]) for summary in self.summaries.values()]

    def diverged(self) -> int:
        """Episodes that had to be given up."""
        return sum(summary["diverged"] for summary in self.summaries.values())


@dataclass(frozen=True)
class Stage:
    """Where arms are compared.

    Attributes:
        spec: what is played.
        instances: id → instance.
        make_run: makes the run that an arm plays on.
        seed: from which each instance's own is derived.
    """

    spec: RunSpec
    instances: Mapping[int, Instance]
    make_run: Callable[[], GrowthRun | SurrogateRun]
    seed: int = 0

    def seed_of(self, id: int) -> int:
        """The seed of an instance's episodes, whatever the arm."""
        return derive(self.seed, "evaluate", id)

    def play(self, arm: str, make_policy: Callable[[int], GrowthPolicy]) -> Played:
        """Play an arm on every instance; `make_policy` makes its controller from an episode's seed."""
        run, summaries = self.make_run(), {}
        progress = Progress(arm, len(self.instances))
        for id, instance in self.instances.items():
            seed = self.seed_of(id)
            run.reset(instance, seed)
            summaries[id] = play(run, make_policy(seed), arm=arm, probe=ChargedProbe(run))
            progress.tick()
        return Played(arm, summaries)

    def first_sites(self) -> set[str]:
        """Ids of the sites that every instance starts with."""
        shallow = min(self.instances, key=lambda id: self.instances[id].n_layer or self.spec.host.n_layer)
        return set(self.make_run().reset(self.instances[shallow], self.seed_of(shallow)).site_ids)


class Progress:
    """A line every few seconds on how many of something are done; none for what takes less."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._eta, self._told = Eta(), time.perf_counter()

    def tick(self) -> None:
        """One more is done."""
        self._done += 1
        if time.perf_counter() - self._told >= TOLD_EVERY and self._done < self._total:
            self._told = time.perf_counter()
            left = self._eta.left(self._done / self._total)
            say(f"  {self._what}: {self._done} of {self._total}, {left} left")
