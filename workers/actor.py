"""GrowthWorker: the Ray actor around a run. One actor is one logical worker; Simic's dispatcher calls it."""

import time
from collections.abc import Callable
from dataclasses import replace

import ray

from esper.platform.contracts import GraftAction, Instance, Run, Transition
from esper.platform.telemetry import Telemetry


@ray.remote(max_restarts=-1)
class GrowthWorker:
    """Runs episodes. After a restart it holds no episode: the dispatcher resets it.

    Args:
        make_run: makes the run, in the actor's own process.
    """

    def __init__(self, make_run: Callable[[], Run]) -> None:
        self._run = make_run()
        self._answered = time.perf_counter()

    def reset(self, instance: Instance | None, seed: int) -> Telemetry:
        """Start an episode."""
        telemetry = self._run.reset(instance, seed)
        self._answered = time.perf_counter()
        return telemetry

    def step(self, action: GraftAction) -> Transition:
        """Apply an action and train to the next decision.

        The transition's info tells how long the worker `waited` for the action and how long it `worked`, in seconds.
        """
        begun = time.perf_counter()
        waited = begun - self._answered
        transition = self._run.step(action)
        self._answered = time.perf_counter()
        return replace(transition, info={**transition.info, "waited": waited, "worked": self._answered - begun})
