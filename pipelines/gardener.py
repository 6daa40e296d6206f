"""Training a gardener: PPO iterations over a fleet, with a live view, tracking, checkpoints and a summary.

A checkpoint follows every iteration, and the journal every decision, so a training that is stopped or killed goes on
from its last decision (`esper ppo --resume`).
"""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from esper.pipelines.job import Job
from esper.pipelines.live import TrainingView
from esper.pipelines.training_picture import training_picture
from esper.platform import cluster
from esper.platform.console import say
from esper.platform.contracts import Instance, Run
from esper.platform.errors import UserError
from esper.platform.model import Frozen
from esper.platform.saves import Saves
from esper.platform.spec import RunSpec
from esper.platform.storage import write_json, write_text
from esper.platform.tracking import Tracker, milliseconds, new_key
from esper.policies.simic.fleet import Fleet, LocalFleet, RayFleet
from esper.policies.simic.health import Health
from esper.policies.simic.learner import build_algorithm, iteration_metrics, restore_algorithm, runner, save_algorithm
from esper.policies.simic.policy import CHECKPOINTS, SimicPolicy, checkpoints
from esper.workers.actor import GrowthWorker
from esper.workers.candidates import telemetry_space
from esper.workers.instances import instance_set
from esper.workers.run import GrowthRun
from esper.workers.surrogate import SurrogateRun
from esper.workers.tolaria.data import TokenData
from esper.workers.worker import EpisodeWorker

SURROGATES = 16  # surrogate runs side by side in the driver
KEPT = 5  # every so many iterations a checkpoint stays; of the others only the newest
EPISODES, SAVES, HISTORY = "episodes", "saves", "history.jsonl"  # in the output folder


class ResumePoint(Frozen):
    """A checkpoint to go on from, and what its training had done by then: the card's `extra`."""

    iterations: int = Field(ge=0)
    episodes: float
    decisions: float
    seed: int
    surrogate: bool
    preset: str | None = None
    data: Path | None = None
    fingerprint: str | None = None  # of the data
    key: str  # of its MLflow run

    @classmethod
    def newest(cls, folder: Path) -> "tuple[Path, ResumePoint]":
        """The newest checkpoint in a `ppo` run's folder.

        Raises:
            UserError: the folder holds none, or one that `esper ppo` did not write.
        """
        found = checkpoints(folder)
        if not found:
            raise UserError(f"--resume {folder} holds no checkpoint: name the output folder of an `esper ppo` run.")
        return found[-1], cls.checked(SimicPolicy.load(found[-1]).card["extra"], f"the card of {found[-1]}")


def train_gardener(
    job: Job,
    out: Path,
    *,
    seed: int,
    parent: str | None = None,
    surrogate: bool = False,
    start: tuple[Path, ResumePoint] | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train on the connected cluster and return the summary, which is also left in `out`.

    Args:
        job: spec and data.
        out: where everything goes.
        seed: of policy, episodes and action noise.
        parent: MLflow run that this one is a child of.
        surrogate: train on SurrogateRun, over its training instances, instead of on text.
        start: where to go on from, in `out`.
        check: called a few times a second while episodes are waited for; what it raises ends the training, from where
            it can be resumed.
    """
    spec, space = job.spec, telemetry_space(job.spec)
    point = start[1] if start is not None else None
    begin, done = 0, {"episodes": 0.0, "decisions": 0.0}
    if point is not None:
        begin, done = point.iterations, {"episodes": point.episodes, "decisions": point.decisions}
    key = point.key if point is not None else new_key()
    storage = str(out / SAVES) if spec.fleet.storage is None else below(spec.fleet.storage, key)
    history = _history(out, begin)
    fingerprint = None if surrogate else job.open_data().manifest.fingerprint()
    make = partial(
        build_algorithm if start is None else partial(restore_algorithm, start[0]),
        spec,
        space,
        fleet_maker(job, storage, surrogate=surrogate),
        seed=seed,
        instances=surrogate_instances(spec) if surrogate else None,
        journal=out / EPISODES,
        check=check,
    )
    with Tracker.start(
        "esper-gardeners",
        out.name if parent is None else f"{out.parent.name}-ppo",
        tags={"kind": "ppo", "arm": "ppo", "seed": seed, "preset": spec.preset},
        params=spec.model_dump(mode="json"),
        parent=parent,
        key=key,
    ) as tracker:
        say(f"ppo     {spec.ppo.iterations} iterations of {spec.ppo.decisions} decisions; building the learner")
        for line in history:  # MLflow may not have had them all
            tracker.log(_logged(line), int(line["iteration"]), at=int(line["time"]))
        algorithm = make()
        ours = runner(algorithm)
        health = Health(spec.ppo.iterations)
        for line in history:
            health.look(_logged(line))  # said already

        def save(iteration: int) -> Path:
            checkpoint = out / CHECKPOINTS / f"{iteration:06d}"
            now = ResumePoint(
                iterations=iteration,
                **done,
                seed=seed,
                surrogate=surrogate,
                preset=spec.preset,
                data=None if surrogate else job.data.absolute(),
                fingerprint=fingerprint,
                key=key,
            )
            try:
                save_algorithm(algorithm, checkpoint, now.model_dump(mode="json"))
            except OSError as error:
                raise UserError(
                    f"checkpoint {checkpoint} cannot be written ({error.strerror or error}): make room, and go on with "
                    f"`esper ppo --resume {out}`."
                ) from error
            _thin_out(out, checkpoint)
            return checkpoint

        try:
            if start is not None:  # it may have been given more iterations
                job.begin()
                (out / "summary.json").unlink(missing_ok=True)
            checkpoint = save(0) if start is None else start[0]
            with TrainingView(spec.ppo.iterations, begin, ours.workers) as view:
                for iteration in range(begin + 1, spec.ppo.iterations + 1):
                    metrics = iteration_metrics(algorithm.train())
                    history.append({"iteration": iteration, "time": milliseconds(), **metrics})
                    done = {key: done[key] + metrics[key] for key in done}
                    with (out / HISTORY).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(_finite(history[-1])) + "\n")
                    checkpoint = save(iteration)
                    tracker.log(metrics, iteration, at=int(history[-1]["time"]))
                    view.iteration(iteration, metrics)
                    for warning in health.look(metrics):
                        say(f"warning: {warning}")
            summary = {
                "preset": spec.preset,
                "seed": seed,
                "surrogate": surrogate,
                "iterations": spec.ppo.iterations,
                **done,
                "episode_return_mean": _finite(history[-1])["return_mean"],
                "checkpoint": str(checkpoint),
                "mlflow": tracker.run_id,
                "history": [_finite(line) for line in history],
            }
        finally:
            algorithm.stop()
        summary |= {"in_flight": ours.in_flight(), "dropped": ours.dropped()}
        if not surrogate:
            Saves(storage).keep_only(summary["in_flight"])
        write_json(out / "summary.json", summary)
        training_picture(history, out / "training.png")
        tracker.artifact(out / "summary.json")
        tracker.artifact(out / "training.png")
        tracker.artifact(checkpoint / "policy", "policy")
    if summary["in_flight"]:
        say(f"saved   {len(summary['in_flight'])} episodes in flight, for a training that goes on")
    if summary["dropped"]:
        say(f"dropped {len(summary['dropped'])} episodes: {', '.join(map(str, summary['dropped']))}")
    say(f"policy  {checkpoint}; use it with: esper train ppo --policy {checkpoint}")
    return {**summary, "where": tracker.where}


def below(place: str, folder: str) -> str:
    """A training's own folder below a place that several may share."""
    if "://" not in place:
        return str(Path(place).expanduser().absolute() / folder)
    head, mark, query = place.partition("?")
    return f"{head.rstrip('/')}/{folder}{mark}{query}"


def fleet_maker(job: Job, storage: str, *, surrogate: bool) -> Callable[[], Fleet]:
    """Makes the workers: Ray actors that train, or surrogate runs in this process."""
    if surrogate:
        return partial(LocalFleet, lambda: EpisodeWorker(partial(SurrogateRun, job.spec)), SURROGATES)
    Saves(job.spec.fleet.storage or storage)  # a place that cannot be is told of here, not by each worker
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
    fleet = spec.fleet
    ppo = spec.ppo
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


def _history(out: Path, begin: int) -> list[dict[str, float]]:
    """The metrics of the first `begin` iterations, as an earlier process left them; later ones are taken out."""
    path = out / HISTORY
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["iteration"] <= begin]
    write_text(path, "".join(kept))
    return [json.loads(line) for line in kept]


def _logged(line: dict[str, float]) -> dict[str, float]:
    """What MLflow gets of a line of the history."""
    return {key: value for key, value in line.items() if key not in ("iteration", "time") and value is not None}


def _finite(line: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in line.items()}


def _thin_out(out: Path, newest: Path) -> None:
    """Remove checkpoints before `newest` that are not to be kept, and what a killed process left of one."""
    for path in (out / CHECKPOINTS).glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints(out):
        number = int(path.name)
        if number < int(newest.name) and (number == 0 or number % KEPT):
            shutil.rmtree(path, ignore_errors=True)
