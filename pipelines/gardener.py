"""Training a gardener: PPO iterations over a fleet, with progress, tracking, checkpoints and a summary."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from esper.pipelines.job import Job
from esper.platform import cluster
from esper.platform.console import Eta, say
from esper.platform.contracts import Run
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


def train_gardener(
    job: Job,
    out: Path,
    *,
    seed: int,
    parent: str | None = None,
    surrogate: bool = False,
    resume: Path | None = None,
    iterations_done: int = 0,
) -> dict[str, Any]:
    """Train on the connected cluster and return the summary, which is also left in `out`.

    Args:
        job: spec and data.
        out: where checkpoints go.
        seed: of policy, episodes and action noise.
        parent: MLflow run that this one is a child of.
        surrogate: train on SurrogateRun instead of on text.
        resume: checkpoint to go on from.
        iterations_done: iterations that the checkpoint has behind it.
    """
    spec, space = job.spec, telemetry_space(job.spec)
    tracker = Tracker.start(
        "esper-gardeners",
        out.name if parent is None else f"{out.parent.name}-ppo",
        tags={"kind": "ppo", "arm": "ppo", "seed": str(seed), "preset": spec.preset},
        params=spec.model_dump(mode="json"),
        parent=parent,
    )
    make_fleet = fleet_maker(job, surrogate=surrogate)
    say(f"ppo     {spec.ppo.iterations} iterations of {spec.ppo.decisions} decisions; building the learner")
    if resume is None:
        algorithm = build_algorithm(spec, space, make_fleet, seed=seed)
    else:
        algorithm = restore_algorithm(resume, spec, space, make_fleet, seed=seed)
    history: list[dict[str, float]] = []
    checkpoint = resume
    eta = Eta()
    with tracker:
        try:
            for iteration in range(iterations_done + 1, spec.ppo.iterations + 1):
                metrics = iteration_metrics(algorithm.train())
                history.append({"iteration": iteration, **metrics})
                tracker.log(metrics, iteration)
                done = len(history) / (spec.ppo.iterations - iterations_done)
                say(f"  {_line(iteration, spec.ppo.iterations, metrics)}, {eta.left(done)} left")
                if iteration == spec.ppo.iterations or iteration % CHECKPOINT_EVERY == 0:
                    checkpoint = out / CHECKPOINTS / f"{iteration:06d}"
                    save_algorithm(
                        algorithm,
                        checkpoint,
                        {"preset": spec.preset, "iterations": iteration, "surrogate": surrogate, "seed": seed},
                    )
        finally:
            algorithm.stop()
        summary = {
            "preset": spec.preset,
            "seed": seed,
            "surrogate": surrogate,
            "iterations": spec.ppo.iterations,
            "episodes": sum(metrics["episodes"] for metrics in history),
            "decisions": sum(metrics["decisions"] for metrics in history),
            "episode_return_mean": history[-1]["return_mean"] if history else None,
            "checkpoint": str(checkpoint),
            "mlflow": tracker.run_id,
            "history": history,
        }
        write_json(out / "summary.json", summary)
        tracker.artifact(out / "summary.json")
        if checkpoint is not None:
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


def _ray_fleet(spec: RunSpec, data: Path) -> Fleet:
    fleet = spec.fleet
    by_cores = max(1, int(cluster.cores() / fleet.cpus)) if fleet.cpus else 1
    count = fleet.workers or (min(by_cores, max(1, int(cluster.gpus() / fleet.gpus))) if fleet.gpus else by_cores)
    say(f"fleet   {count} workers, each with {fleet.cpus:g} core(s)" + (f", {fleet.gpus:g} GPU" if fleet.gpus else ""))

    def make_worker(number: int):
        options = GrowthWorker.options(num_cpus=fleet.cpus, num_gpus=fleet.gpus, name=None)
        return options.remote(partial(make_run, spec, data))

    return RayFleet(make_worker, count)


def _line(iteration: int, iterations: int, metrics: dict[str, float]) -> str:
    busy = f", workers busy {metrics['busy']:.0%}" if "busy" in metrics else ""  # surrogates have no clock of their own
    return (
        f"iteration {iteration}/{iterations}: return {metrics['return_mean']:+.3f}, "
        f"{metrics['episodes']:.0f} episodes, wait {metrics['wait']:.0%}, entropy {metrics['entropy']:.2f}, "
        f"explained variance {metrics['explained_variance']:+.2f}{busy}"
    )
