"""GrowthWorker: the Ray actor around an EpisodeWorker; Simic's dispatcher sends it orders."""

from collections.abc import Callable

import ray

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import Order, Reply, Run
from esper.workers.worker import EpisodeWorker


@ray.remote(max_restarts=0)  # the fleet starts another: a restart by Ray would hold calls until there is room for it
class GrowthWorker:
    """Carries out orders in a process of its own.

    Args:
        make_run: makes the run, in the actor's process.
        storage: path or URI of the saves; none saves nothing.
    """

    def __init__(self, make_run: Callable[[], Run], storage: str | None = None) -> None:
        self._worker = EpisodeWorker(make_run, None if storage is None else CheckpointStore(storage))

    def up(self) -> None:
        """Answers once the process is there and its run is made."""

    def advance(self, order: Order) -> Reply:
        """`EpisodeWorker.advance`."""
        return self._worker.advance(order)
