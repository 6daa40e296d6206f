"""GrowthWorker: the Ray actor of an EpisodeWorker; Simic's dispatcher sends it orders."""

import ray

from esper.workers.worker import EpisodeWorker

# The fleet starts another one: a restart by Ray would hold calls until there is room for it.
GrowthWorker = ray.remote(max_restarts=0)(EpisodeWorker)
