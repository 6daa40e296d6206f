"""GrowthWorker: the Ray actor around a run. One actor is one logical worker; Simic's dispatcher calls it."""

from collections.abc import Callable

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

    def reset(self, instance: Instance | None, seed: int) -> Telemetry:
        """Start an episode."""
        return self._run.reset(instance, seed)

    def step(self, action: GraftAction) -> Transition:
        """Apply an action and train to the next decision."""
        return self._run.step(action)
