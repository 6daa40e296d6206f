"""Training a gardener: PPO iterations over a fleet, with progress, tracking, checkpoints and a summary."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from esper.pipelines.job import Job
from esper.platform import cluster
from esper.platform.console import Eta, say
from esper.platform.contracts import Run
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec
from esper.platform.storage import write_json
from esper.platform.tracking import Tracker
from esper.policies.simic.fleet import Fleet, LocalFleet, RayFleet
from esper.policies.simic.learner import build_algorithm, iteration_metrics, restore_algorithm, save_algorithm
from esper.policies.simic.policy import CHECKPOINTS
from esper.workers.actor import GrowthWorker
from esper.workers.candidates import telemetry_space
from esper.workers.run import GrowthRun
from esper.workers.surrogate import SurrogateRun
from esper.workers.tolaria.data import TokenData

SURROGATES = 16  # surrogate runs side by side in the driver
CHECKPOINT_EVERY = 5  # iterations


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from, and what its training had done by then."""

    checkpoint: Path
    iterations: int
    episodes: float
    decisions: float
    seed: int
    surrogate: bool


def train_gardener(
    job: Job,
    out: Path,
    *,
    seed: int,
    parent: str | None = None,
    surrogate: bool = False,
    start: ResumePoint | None = None,
) -> dict[str, Any]:
    """Train on the connected cluster and return the summary, which is also left in `out`.

    Args:
        job: spec and data.
        out: where checkpoints go.
        seed: of policy, episodes and action noise.
        parent: MLflow run that this one is a child of.
        surrogate: train on SurrogateRun instead of on text.
        start: where to go on from.
    """
    spec, space = job.spec, telemetry_space(job.spec)
    make_fleet = fleet_maker(job, surrogate=surrogate)
    begin = 0 if start is None else start.iterations
    done = {"episodes": 0.0, "decisions": 0.0}
    if start is not None:
        done = {"episodes": start.episodes, "decisions": start.decisions}
    history: list[dict[str, float]] = []
    checkpoint: Path | None = None
    with Tracker.start(
        "esper-gardeners",
        out.name if parent is None else f"{out.parent.name}-ppo",
        tags={"kind": "ppo", "arm": "ppo", "seed": seed, "preset": spec.preset},
        params=spec.model_dump(mode="json"),
        parent=parent,
    ) as tracker:
        say(f"ppo     {spec.ppo.iterations} iterations of {spec.ppo.decisions} decisions; building the learner")
        if start is None:
            algorithm = build_algorithm(spec, space, make_fleet, seed=seed)
        else:
            algorithm = restore_algorithm(start.checkpoint, spec, space, make_fleet, seed=seed)
        eta = Eta()
        try:
            for iteration in range(begin + 1, spec.ppo.iterations + 1):
                metrics = iteration_metrics(algorithm.train())
                history.append({"iteration": iteration, **metrics})
                done = {key: done[key] + metrics[key] for key in done}
                tracker.log(metrics, iteration)
                left = eta.left(len(history) / (spec.ppo.iterations - begin))
                say(f"  {_line(iteration, spec.ppo.iterations, metrics)}, {left} left")
                if iteration == spec.ppo.iterations or iteration % CHECKPOINT_EVERY == 0:
                    checkpoint = out / CHECKPOINTS / f"{iteration:06d}"
                    extra = {"iterations": iteration, **done, "seed": seed, "surrogate": surrogate}
                    save_algorithm(algorithm, checkpoint, extra)
        finally:
            algorithm.stop()
        assert checkpoint is not None
        summary = {
            "preset": spec.preset,
            "seed": seed,
            "surrogate": surrogate,
            "iterations": spec.ppo.iterations,
            **done,
            "episode_return_mean": history[-1]["return_mean"],
            "checkpoint": str(checkpoint),
            "mlflow": tracker.run_id,
            "history": history,
        }
        write_json(out / "summary.json", summary)
        tracker.artifact(out / "summary.json")
        tracker.artifact(checkpoint / "policy", "policy")
    say(f"policy  {checkpoint}; use it with: esper train ppo --policy {checkpoint}")
    return {**summary, "where": tracker.where}


def fleet_maker(job: Job, *, surrogate: bool) -> Callable[[], Fleet]:
    """Makes the workers: Ray actors that train, or surrogate runs in this process."""
    if surrogate:
        return partial(LocalFleet, partial(SurrogateRun, job.spec), SURROGATES)
    return partial(_ray_fleet, job.spec, job.data)


def make_run(spec: RunSpec, data: Path) -> Run:
    """A worker's run, made in its own process."""
    return GrowthRun(spec, TokenData.open(data, verify=False))


def gpus_needed(spec: RunSpec) -> int | None:
    """GPUs that a cluster must have for one worker or trial; None where none is needed."""
    return math.ceil(spec.fleet.gpus) or None


def _ray_fleet(spec: RunSpec, data: Path) -> Fleet:
    fleet = spec.fleet
    room = cluster.fit(fleet.cpus, fleet.gpus)
    count = room if fleet.workers is None else fleet.workers
    if count > room:
        raise UserError(
            f"fleet.workers is {count}, but the cluster holds {room} of them: set it lower, or leave it out."
        )
    say(f"fleet   {count} workers, each with {fleet.cpus:g} core(s)" + (f", {fleet.gpus:g} GPU" if fleet.gpus else ""))

    def make_worker(number: int):
        options = GrowthWorker.options(num_cpus=fleet.cpus, num_gpus=fleet.gpus)
        return options.remote(partial(make_run, spec, data))

    return RayFleet(make_worker, count)


def _line(iteration: int, iterations: int, metrics: dict[str, float]) -> str:
    busy = f", workers busy {metrics['busy']:.0%}" if "busy" in metrics else ""  # surrogates have no clock of their own
    return (
        f"iteration {iteration}/{iterations}: return {metrics['return_mean']:+.3f}, "
        f"{metrics['episodes']:.0f} episodes, wait {metrics['wait']:.0%}, entropy {metrics['entropy']:.2f}, "
        f"explained variance {metrics['explained_variance']:+.2f}{busy}"
    )
