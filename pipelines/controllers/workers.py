"""The workers of a training: Ray actors that train GPTs, or surrogate runs in this process."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from esper.pipelines.common.arguments import CommonArguments
from esper.pipelines.common.play import play
from esper.pipelines.common.preset import describe, resolve_spec
from esper.platform import cluster
from esper.platform.checkpoint import CheckpointStore
from esper.platform.console import counted, say
from esper.platform.contracts import Instance, Run
from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.ledger import AXES
from esper.platform.spec import RunSpec
from esper.policies.simic.fleet import Fleet, LocalFleet, RayFleet
from esper.policies.simic.policy import SimicPolicy
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.run import GrowthRun
from esper.workers.several import SeveralRuns, shared_space
from esper.workers.tolaria.data import ensure, open_data
from esper.workers.worker import EpisodeWorker, GrowthWorker

Task = tuple[RunSpec, Path | None]  # and its prepared data; without them a surrogate's
SURROGATES = 16  # surrogate runs side by side in the driver


def fleet_maker(tasks: Sequence[Task], storage: str, laws: Path | None = None) -> Callable[[], Fleet]:
    """A maker of the workers, which save runs in `storage`; without data they are surrogates and save nothing."""
    (spec, data), make = tasks[0], partial(make_any_run, tasks, laws)
    if data is None:
        return partial(LocalFleet, lambda: EpisodeWorker(make), SURROGATES)
    CheckpointStore(storage).close()  # a place that cannot be is told of here, not by each worker
    return partial(_ray_fleet, spec, make, storage)


def planned_task(name: str) -> dict[str, str]:
    """A further task as a training's plan has it, of `PRESET` or `PRESET=DATA`; data are prepared if needed."""
    preset, _, data = name.partition("=")
    spec = resolve_spec(CommonArguments(preset=preset, data=Path(data) if data else None), on="fleet")
    prepared = open_data(ensure(spec.data).resolve())
    prepared.check(spec)
    say(f"and     {spec.preset}: {describe(spec)}")
    spec = spec.overridden({"budget.cooldowns": []})  # no controller learns from a fork's loss
    told = {"data": str(prepared.path), "fingerprint": prepared.manifest.fingerprint()}
    return {"spec": spec.model_dump_json(), **told}


def other_tasks(plan: Mapping[str, Any]) -> list[Task]:
    """The further tasks of a training's plan; a UserError where data have changed since it began."""
    found = []
    for task in plan.get("also") or ():
        if open_data(Path(task["data"])).manifest.fingerprint() != task["fingerprint"]:
            raise UserError(f"{task['data']} was changed since the training began: restore it, or start anew.")
        found.append((RunSpec.model_validate_json(task["spec"]), Path(task["data"])))
    return found


def make_run(task: Task, laws: Path | None = None) -> GrowthRun | SurrogateRun:
    """A worker's run, made in its own process; without data on the spec's laws, or on fitted ones."""
    spec, data = task
    if data is not None:
        return GrowthRun(spec, open_data(data, verify=False))
    return SurrogateRun(spec, None if laws is None else FittedLaws.read(laws))


def make_any_run(tasks: Sequence[Task], laws: Path | None = None) -> Run:
    """A worker's run of whichever of these tasks it is asked for."""
    runs = [make_run(task, laws) for task in tasks]
    return runs[0] if len(runs) == 1 else SeveralRuns(runs, shared_space([spec for spec, _ in tasks]))


def held_out_episode(task: Task, laws: Path | None, policy: SimicPolicy, at: Instance, seed: int) -> dict[str, Any]:
    """What an episode comes to that is not learned from, in a process of its own on text."""
    run = make_run(task, laws)
    run.reset(at, seed)
    summary = play(run, policy, arm="ppo")
    return {name: summary[name] for name in ("val_loss", "diverged", *AXES)}


def session(spec: RunSpec, *, surrogates: bool = False) -> AbstractContextManager[None]:
    """The cluster that GPTs are trained on, and learners; none for surrogates where this process learns."""
    learners = _for_learners(spec)
    if surrogates:
        here = not spec.ppo.learners and not spec.ppo.learner_gpus
        return nullcontext() if here else cluster.session(gpus=math.ceil(learners) or None)
    if spec.device == "cuda" and not spec.fleet.gpus:
        what = "device is 'cuda', but fleet.gpus is 0, and Ray hides all GPUs from such runs"
        raise UserError(f"{what}: set fleet.gpus=0.25.")
    return cluster.session(gpus=None if _grows(spec) else math.ceil(spec.fleet.gpus + learners) or None)


def _ray_fleet(spec: RunSpec, make: Callable[[], Run], storage: str) -> Fleet:
    fleet, ppo = spec.fleet, spec.ppo
    taken = (0 if ppo.learner_gpus else ppo.learners, _for_learners(spec))  # as RLlib asks for them
    room = (cluster.room if _grows(spec) else cluster.fit)(fleet.cpus, fleet.gpus, taken)
    count = room if fleet.workers is None else fleet.workers
    if count > room and not cluster.attached():
        what = f"fleet.workers is {count}, but this machine holds {room} of them"
        raise UserError(f"{what}: set it lower, or leave it out.")
    each = counted(fleet.cpus, "core") + (f" and {counted(fleet.gpus, 'GPU')}" if fleet.gpus else "")
    say(f"fleet   {counted(count, 'worker')}, each with {each}; checkpoints in {storage}")
    if count > room:
        say(f"        the cluster has room for {room}; the others join as nodes do")

    def make_worker():
        options = GrowthWorker.options(num_cpus=fleet.cpus, num_gpus=fleet.gpus)
        return options.remote(make, storage)

    return RayFleet(make_worker, lambda: fleet.workers or cluster.room(fleet.cpus, fleet.gpus, taken))


def _for_learners(spec: RunSpec) -> float:
    """GPUs; without processes of their own the driver learns on one."""
    return max(1, spec.ppo.learners) * spec.ppo.learner_gpus


def _grows(spec: RunSpec) -> bool:
    """Whether the cluster may add nodes for the workers asked for."""
    return cluster.attached() and spec.fleet.workers is not None
