"""Training a controller: PPO iterations over a fleet, with a live view, tracking, checkpoints and a summary.

A checkpoint follows every iteration, and the journal every decision, so a training that is stopped or killed goes on
from its last decision (`esper ppo --resume`).
"""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import Field
from ray.rllib.algorithms.ppo import PPO

from esper.pipelines.common.run_folder import Job
from esper.pipelines.controllers.live import TrainingView
from esper.pipelines.controllers.training_log import TrainingLog, as_json
from esper.pipelines.controllers.training_picture import training_picture
from esper.platform import cluster
from esper.platform.checkpoint import CheckpointStore, below
from esper.platform.console import say
from esper.platform.contracts import Instance, Run
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec
from esper.platform.storage import write_json
from esper.platform.tracking import Tracker, new_key, sync
from esper.policies.simic.fleet import Fleet, LocalFleet, RayFleet
from esper.policies.simic.health import Health
from esper.policies.simic.learner import build_algorithm, iteration_metrics, restore_algorithm, runner, save_algorithm
from esper.policies.simic.policy import CHECKPOINTS, SimicPolicy, checkpoints
from esper.workers.actor import GrowthWorker
from esper.workers.candidates import telemetry_space
from esper.workers.instances import instance_set
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData
from esper.workers.worker import EpisodeWorker, save_name

SURROGATES = 16  # surrogate runs side by side in the driver
KEPT = 5  # every so many iterations a checkpoint stays; of the others only the newest
EPISODES, SAVES = "episodes", "saves"  # in the output folder
ON_LAWS: dict[str, int] = {"ppo.iterations": 80, "ppo.decisions": 1024, "ppo.minibatch": 256}
"""What it takes to learn on loss laws, where a decision costs a third of a millisecond; on text it would be days."""


class ResumePoint(Frozen):
    """Where a training stands, and what it goes on with: kept as `extra` in the card of each checkpoint's policy."""

    iterations: int = Field(default=0, ge=0)
    episodes: float = 0.0
    decisions: float = 0.0
    seed: int
    surrogate: bool
    preset: str | None = None
    data: Path | None = None
    fingerprint: str | None = None  # of the data
    key: str  # of its MLflow run

    @classmethod
    def first(cls, job: Job, seed: int, *, surrogate: bool) -> Self:
        """That of a training which is about to begin."""
        point = cls(seed=seed, surrogate=surrogate, preset=job.spec.preset, key=new_key())
        if surrogate:
            return point
        of_data = {"data": job.data.absolute(), "fingerprint": job.open_data().manifest.fingerprint()}
        return point.model_copy(update=of_data)

    @classmethod
    def newest(cls, folder: Path) -> tuple[Path, Self]:
        """The newest checkpoint in a `ppo` run's folder.

        Raises:
            UserError: the folder holds none, or one that `esper ppo` did not write.
        """
        found = checkpoints(folder)
        if not found:
            raise UserError(f"--resume {folder} holds no checkpoint: name the output folder of an `esper ppo` run.")
        return found[-1], cls.checked(SimicPolicy.load(found[-1]).card["extra"], f"the card of {found[-1]}")

    def after(self, metrics: dict[str, float]) -> Self:
        """One iteration later."""
        done = {name: getattr(self, name) + metrics[name] for name in ("episodes", "decisions")}
        return self.model_copy(update={"iterations": self.iterations + 1, **done})


def train_controller(
    job: Job,
    out: Path,
    *,
    seed: int,
    parent: Tracker | None = None,
    surrogate: bool = False,
    start: tuple[Path, ResumePoint] | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train on the connected cluster and return the summary, which is also left in `out`.

    Args:
        job: spec and data.
        out: where everything goes.
        seed: of policy, episodes and action noise.
        parent: of the MLflow run that this one is a child of.
        surrogate: train on SurrogateRun, over its training instances, instead of on text.
        start: where to go on from, in `out`.
        check: called a few times a second while episodes are waited for; what it raises ends the training, from where
            it can be resumed.
    """
    spec = job.spec
    point = ResumePoint.first(job, seed, surrogate=surrogate) if start is None else start[1]
    storage = str(out / SAVES) if spec.fleet.storage is None else below(spec.fleet.storage, point.key)
    log = TrainingLog(out, point.iterations)
    make = partial(
        build_algorithm if start is None else partial(restore_algorithm, start[0]),
        spec,
        telemetry_space(spec),
        fleet_maker(job, storage, surrogate=surrogate),
        seed=seed,
        instances=surrogate_instances(spec) if surrogate else None,
        journal=out / EPISODES,
        check=check,
    )
    with _tracker(spec, out, point, parent) as tracker:
        say(f"ppo     {spec.ppo.iterations} iterations of {spec.ppo.decisions} decisions; building the learner")
        log.send(tracker)  # MLflow may not have had them all
        algorithm = make()
        ours = runner(algorithm)
        try:
            if start is None:
                _save(algorithm, out, point)
            else:  # it may have been given more iterations
                job.begin()
                (out / "summary.json").unlink(missing_ok=True)
            point = _iterate(algorithm, spec.ppo.iterations, out, point, log, tracker)
        finally:
            algorithm.stop()
        checkpoint = _checkpoint(out, point)
        summary = {
            "preset": spec.preset,
            "seed": seed,
            "surrogate": surrogate,
            "iterations": point.iterations,
            "episodes": point.episodes,
            "decisions": point.decisions,
            "episode_return_mean": as_json(log.lines[-1])["return_mean"],
            "checkpoint": str(checkpoint),
            "in_flight": ours.in_flight(),
            "dropped": ours.dropped(),
            "mlflow": tracker.run_id,
            "history": [as_json(line) for line in log.lines],
        }
        if not surrogate:
            with CheckpointStore(storage) as saves:
                saves.keep_only(map(save_name, summary["in_flight"]))
        write_json(out / "summary.json", summary)
        training_picture(log.lines, out / "training.png")
        _keep_with_run(tracker, out, checkpoint)
    if summary["in_flight"]:
        say(f"saved   {len(summary['in_flight'])} episodes in flight, for a training that goes on")
    if summary["dropped"]:
        say(f"dropped {len(summary['dropped'])} episodes: {', '.join(map(str, summary['dropped']))}")
    say(f"policy  {checkpoint}; use it with: esper train ppo --policy {checkpoint}")
    return {**summary, "where": tracker.where}


def send_again(out: Path, parent: Tracker | None = None) -> bool:
    """Send MLflow all of a training that ended while it was away; whether it has had everything now."""
    return sync(out)


def _tracker(spec: RunSpec, out: Path, point: ResumePoint, parent: Tracker | None) -> Tracker:
    """That of the training's run; the log's points have to be sent to it first."""
    return Tracker.start(
        out,
        "esper-controllers",
        out.name if parent is None else f"{out.parent.name}-{out.name}",
        tags={"kind": "ppo", "arm": "ppo", "seed": point.seed, "preset": spec.preset},
        params=spec.model_dump(mode="json"),
        parent=parent,
        key=point.key,
    )


def _keep_with_run(tracker: Tracker, out: Path, checkpoint: Path) -> None:
    tracker.artifact(out / "summary.json")
    tracker.artifact(out / "training.png")
    tracker.artifact(checkpoint / "policy", "policy")


def _iterate(
    algorithm: PPO, iterations: int, out: Path, point: ResumePoint, log: TrainingLog, tracker: Tracker
) -> ResumePoint:
    """Train from where `point` stands to the last iteration, a checkpoint after each; returns where it stands then."""
    health = Health(iterations)
    for metrics in log.metrics():
        health.look(metrics)  # said already
    with TrainingView(iterations, point.iterations, runner(algorithm).workers) as view:
        while point.iterations < iterations:
            metrics = iteration_metrics(algorithm.train())
            point = point.after(metrics)
            at = log.add(point.iterations, metrics)
            _save(algorithm, out, point)
            tracker.log(metrics, point.iterations, at=at)
            view.iteration(point.iterations, metrics)
            for warning in health.look(metrics):
                say(f"warning: {warning}")
    return point


def _checkpoint(out: Path, point: ResumePoint) -> Path:
    return out / CHECKPOINTS / f"{point.iterations:06d}"


def _save(algorithm: PPO, out: Path, point: ResumePoint) -> None:
    """Write the checkpoint of where the training stands, and remove those before it that are not to be kept.

    Raises:
        UserError: it cannot be written.
    """
    checkpoint = _checkpoint(out, point)
    try:
        save_algorithm(algorithm, checkpoint, point.model_dump(mode="json"))
    except OSError as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be written ({error.strerror or error}): make room, and go on with "
            f"`esper ppo --resume {out}`."
        ) from error
    for path in (out / CHECKPOINTS).glob(".*.partial"):  # of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints(out):
        number = int(path.name)
        if number < point.iterations and (number == 0 or number % KEPT):
            shutil.rmtree(path, ignore_errors=True)


def fleet_maker(job: Job, storage: str, *, surrogate: bool) -> Callable[[], Fleet]:
    """Makes the workers: Ray actors that train, or surrogate runs in this process."""
    if surrogate:
        return partial(LocalFleet, lambda: EpisodeWorker(partial(SurrogateRun, job.spec)), SURROGATES)
    CheckpointStore(job.spec.fleet.storage or storage)  # a place that cannot be is told of here, not by each worker
    return partial(_ray_fleet, job.spec, job.data, storage)


def surrogate_instances(spec: RunSpec) -> Callable[[int], Instance]:
    """Episode number → training instance, all in turn."""
    instances = list(instance_set("train", spec).values())
    return lambda number: instances[number % len(instances)]


def make_run(spec: RunSpec, data: Path) -> Run:
    """A worker's run, made in its own process."""
    return GrowthRun(spec, TokenData.open(data, verify=False))


def gpus_needed(spec: RunSpec) -> int | None:
    """GPUs that a cluster must have, for one worker or trial and for learners; None for none, or where it grows."""
    needed = math.ceil(spec.fleet.gpus + spec.ppo.learners * spec.ppo.learner_gpus)
    return None if _grows(spec) else needed or None


def _ray_fleet(spec: RunSpec, data: Path, storage: str) -> Fleet:
    fleet, ppo = spec.fleet, spec.ppo
    taken = (0 if ppo.learner_gpus else ppo.learners, ppo.learners * ppo.learner_gpus)  # as RLlib asks for them
    room = (cluster.room if _grows(spec) else cluster.fit)(fleet.cpus, fleet.gpus, taken)
    count = room if fleet.workers is None else fleet.workers
    if count > room and not cluster.attached():
        raise UserError(
            f"fleet.workers is {count}, but this machine holds {room} of them: set it lower, or leave it out."
        )
    each = f"{fleet.cpus:g} core(s)" + (f", {fleet.gpus:g} GPU" if fleet.gpus else "")
    say(f"fleet   {count} workers, each with {each}; saved in {storage}")
    if count > room:
        say(f"        the cluster has room for {room}; the others join as nodes do")

    def make_worker():
        options = GrowthWorker.options(num_cpus=fleet.cpus, num_gpus=fleet.gpus)
        return options.remote(partial(make_run, spec, data), storage)

    return RayFleet(make_worker, lambda: fleet.workers or cluster.room(fleet.cpus, fleet.gpus, taken), cluster.cores)


def _grows(spec: RunSpec) -> bool:
    """Whether the cluster may have no node for workers yet: a number of them that is asked for makes it grow."""
    return cluster.attached() and spec.fleet.workers is not None
