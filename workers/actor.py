"""GrowthWorker: the Ray actor of an EpisodeWorker, driven by Simic's dispatcher."""

import ray

from esper.workers.worker import EpisodeWorker

# No restarts: Ray would hold calls until it has room; the fleet starts a new actor instead.
GrowthWorker = ray.remote(max_restarts=0)(EpisodeWorker)
