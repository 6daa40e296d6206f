"""Trains a controller: PPO iterations over a fleet, with a live view, tracking, checkpoints and a summary.

`esper ppo --resume` continues after the last decision. The result is the policy of the lowest mean final loss over
held-out episodes, the tuning set's instances, on text and on loss laws alike; they are the same for all candidates.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from pydantic import Field

from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.controllers.live import TrainingView
from esper.pipelines.controllers.rounds import Given, Rounds
from esper.pipelines.controllers.workers import Task, fleet_maker, held_out_episode, other_tasks
from esper.platform.checkpoint import CheckpointStore, below
from esper.platform.console import counted, say
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.journal import Journal, read_entries
from esper.platform.ledger import AXES
from esper.platform.seeding import derive
from esper.platform.storage import write_json
from esper.platform.tracking import Tracker, milliseconds
from esper.policies.simic.health import Health
from esper.policies.simic.policy import CHECKPOINTS, FILE, SimicPolicy, checkpoints
from esper.policies.simic.ppo import PPOTraining
from esper.workers.instances import in_turn
from esper.workers.several import shared_space
from esper.workers.worker import save_name

CANDIDATES = 5  # policies of a training, evenly apart, whose checkpoints stay; of the others only the newest
SUMMARY, PICTURE, HISTORY, EPISODES, SAVES = "summary.json", "training.png", "history.jsonl", "episodes", "saves"
COUNTED = (
    "everything that GPTs were trained for: episodes learned from, in flight and dropped, and held-out ones; not what "
    "was trained twice after a worker's death"
)
PLAYED = "heldout.jsonl"  # held-out episodes, one a line: choosing can be gone on with
KEPT = (SUMMARY, PICTURE, FILE)  # in MLflow
WAIT = 0.25  # seconds between two calls of `check`
ON_LAWS = {"ppo.iterations": 80, "ppo.decisions": 1024, "ppo.minibatch": 256, "ppo.held_out": 16}  # enough there

Key = tuple[int, int]  # iteration, episode
Episode = tuple[Task, Path | None, SimicPolicy, Instance, int]  # the arguments of `held_out_episode`


class Reached(Frozen):
    """A training's progress: `extra` in the card of each checkpoint's policy."""

    key: str  # of the training
    preset: str
    seed: int
    surrogate: bool
    hosts: tuple[str, ...] = ("transformer",)  # the kinds that it has grown, those of the policy it began with first
    iterations: int = Field(default=0, ge=0)
    episodes: float = 0.0
    decisions: float = 0.0
    at: int = 0  # when the last iteration ended, milliseconds
    last: dict[str, float] = Field(default={})  # its finite metrics

    @classmethod
    def of(cls, folder: RunFolder, hosts: Iterable[str] = ()) -> Self:
        """The newest checkpoint's progress, or the start's; UserError for another training's checkpoint.

        `hosts`: the kinds that it grows, after those that the policy which it begins with has grown.
        """
        there = checkpoints(folder.out)
        if not there:
            own = {"key": folder.key, "preset": folder.spec.preset, "seed": folder.seed}
            return cls(**own, surrogate=folder.data is None, hosts=tuple(dict.fromkeys(hosts)))
        reached = cls.checked(SimicPolicy.load(there[-1]).card["extra"], f"the card of {there[-1]}")
        if reached.key != folder.key:
            raise UserError(f"checkpoint {there[-1]} is another training's: put back the one that was there.")
        return reached

    def after(self, metrics: dict[str, float]) -> Self:
        done = {name: getattr(self, name) + metrics[name] for name in ("episodes", "decisions")}
        last = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return self.model_copy(update={"iterations": self.iterations + 1, "at": milliseconds(), "last": last, **done})


def train_controller(
    folder: RunFolder,
    *,
    laws: Path | None = None,
    init_from: Path | None = None,
    parent: Tracker | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train on the connected cluster, or resume, and return the summary, also left in the folder.

    A folder without data trains on loss laws. It begins with the policy `init_from`, or with a clone of the planner on
    fitted `laws`, in as many rounds as the folder's plan says, or from nothing. `check` is called often and may raise;
    the training can be resumed.
    """
    out, surrogate = folder.out, folder.data is None
    spec = folder.spec.overridden({"budget.cooldowns": []})  # no controller learns from a fork's loss
    storage = str(out / SAVES) if spec.fleet.storage is None else below(spec.fleet.storage, folder.key)
    tasks: list[Task] = [(spec, folder.data), *other_tasks(folder.plan)]
    specs = [each for each, _ in tasks]
    start = None if init_from is None else Given(init_from)
    if laws is not None:
        start = Rounds(folder, spec, laws, folder.plan.get("rounds") or 1, check)
    reached = Reached.of(folder, [*(start.hosts if start else ()), *(each.host.kind for each in specs)])
    for name in (SUMMARY, FILE):  # of a training that is given more iterations
        (out / name).unlink(missing_ok=True)
    with track(folder, parent) as tracker, closing(Journal(out / HISTORY, lambda entry: entry["iteration"])) as history:
        iterations = counted(spec.ppo.iterations, "iteration")
        say(f"ppo     {iterations} of {spec.ppo.decisions} decisions; building the learner")
        _note(history, tracker, reached)  # the process may have died before it did
        if start is not None and not checkpoints(out):
            start.begin(_checkpoint(out, 0), reached.model_dump(mode="json"))
        training = PPOTraining(
            spec,
            shared_space(specs),
            fleet_maker(tasks, storage, laws),
            seed=folder.seed,
            instances=in_turn("train", specs, text=not surrogate),
            journal=out / EPISODES,
            check=check,
            start=next(reversed(checkpoints(out)), None),
        )
        try:
            reached = _iterate(training, spec.ppo.iterations, out, reached, partial(_note, history, tracker), start)
        finally:
            training.stop()
        clones = [] if start is None else start.told()
        played = held_out(tasks, out, folder.seed, check, laws)
        dispatcher, losses, parts = training.dispatcher, mean_losses(played), {}
        left = {"in_flight": dispatcher.in_flight(), "dropped": dispatcher.progress.dropped, "mlflow": tracker.run_id}
        left |= {"clones": clones} if clones else {}
        if not surrogate:
            parts = {**dispatcher.spent(), "held_out": {axis: sum(entry[axis] for entry in played) for axis in AXES}}
            with CheckpointStore(storage) as saves:
                saves.keep_only(map(save_name, left["in_flight"]))
        whole = {name: {axis: part.get(axis, 0.0) for axis in AXES} for name, part in parts.items()}
        left |= {"spent": {axis: sum(part[axis] for part in whole.values()) for axis in AXES}, "spent_on": whole}
        left["spent_counts"] = COUNTED if parts else "nothing: no GPT was trained"
        summary = _conclude(out, reached, losses, left)
        for iteration, loss in losses.items():
            tracker.log({"held_out_loss": loss}, iteration)
        for name in KEPT:
            tracker.artifact(out / name)
    return {**summary, "where": tracker.where}


def track(folder: RunFolder, parent: Tracker | None = None) -> Tracker:
    """The tracker of a training's MLflow run."""
    name = folder.out.name if parent is None else f"{folder.out.parent.name}-{folder.out.name}"
    tags = {"kind": "ppo", "arm": "ppo"}
    return folder.track(tags, experiment="esper-controllers", run_name=name, parent=parent)


def _note(history: Journal, tracker: Tracker, reached: Reached) -> None:
    """Keep the last iteration's metrics in `history.jsonl` and in MLflow, once."""
    if reached.iterations:
        history.add({"iteration": reached.iterations, "time": reached.at, **reached.last})
        tracker.log(reached.last, reached.iterations, at=reached.at)


def _iterate(
    training: PPOTraining,
    iterations: int,
    out: Path,
    reached: Reached,
    note: Callable[[Reached], None],
    start: Rounds | Given | None,
) -> Reached:
    """Train to the last iteration, a checkpoint after each, of which the newest stays, and `CANDIDATES`."""
    health, every = Health(iterations), math.ceil(iterations / CANDIDATES)
    for metrics in read_entries(out / HISTORY):
        health.look(metrics)  # said already
    with TrainingView(iterations, reached.iterations, training.dispatcher.workers) as view:
        while reached.iterations < iterations:
            if start is not None:
                training.anchor = start.anchor(reached.iterations)
            metrics = training.iterate()
            reached = reached.after(metrics)
            if start is not None:
                start.note(reached.iterations, training.episodes)
            try:
                training.save(_checkpoint(out, reached.iterations), reached.model_dump(mode="json"))
            except OSError as error:
                what = f"no checkpoint can be written ({error})"
                raise UserError(f"{what}: make room, and go on with `esper ppo --resume {out}`.") from error
            for path in sorted((out / CHECKPOINTS).glob("0*"))[:-1]:  # those that a kill left half deleted too
                if int(path.name) % every:
                    shutil.rmtree(path, ignore_errors=True)
            note(reached)
            texts = {each.number: each.summary.get("sample") for each in training.episodes}
            view.iteration(reached.iterations, metrics, texts)
            for warning in health.look(metrics):
                say(f"warning: {warning}")
    return reached


def _conclude(out: Path, reached: Reached, losses: dict[int, float], others: dict[str, Any]) -> dict[str, Any]:
    """Write the best policy, the picture and the summary, which ends the training; and say so."""
    from esper.pipelines.controllers.training_picture import training_picture  # matplotlib takes a second

    iterations, last = read_entries(out / HISTORY), reached.iterations
    best = min(losses, key=lambda iteration: (losses[iteration], -iteration), default=last)
    summary = {
        **reached.model_dump(mode="json", exclude={"at", "last"}),
        "episode_return_mean": iterations[-1]["return_mean"],
        "checkpoint": str(_checkpoint(out, best)),
        "best_iteration": best,
        "held_out_losses": {i: loss if math.isfinite(loss) else None for i, loss in losses.items()},
        **others,
        "history": iterations,
    }
    shutil.copyfile(_checkpoint(out, best) / FILE, out / FILE)
    drawn = [row | {"held_out_loss": losses.get(int(row["iteration"]), math.nan)} for row in iterations]
    training_picture(drawn, out / PICTURE)
    write_json(out / SUMMARY, summary)
    dropped = ", ".join(map(str, summary["dropped"])) or "none"
    say(f"saved   {len(summary['in_flight'])} episodes in flight, for a training that goes on; dropped: {dropped}")
    if losses:
        say(f"best    iteration {best}, held-out loss {losses[best]:.4f}; the last has {losses[last]:.4f}")
    say(f"policy  {out / FILE}; use it with: esper train ppo --policy {out}")
    return summary


def _checkpoint(out: Path, iteration: int) -> Path:
    return out / CHECKPOINTS / f"{iteration:06d}"


def held_out(
    tasks: Sequence[Task], out: Path, seed: int, check: Callable[[], None], laws: Path | None = None
) -> list[dict[str, Any]]:
    """`iteration`, `episode`, `val_loss`, `diverged` and ledger axes per held-out episode and checkpoint in `out`.

    Episodes are of each task in turn, one of each at least. `check` may raise; a later call continues.
    """
    (spec, data), turns = tasks[0], len(tasks)
    number = spec.ppo.held_out and max(spec.ppo.held_out, turns)
    instances = in_turn("tuning", [each for each, _ in tasks], text=data is not None)
    episodes: dict[Key, Episode] = {}
    for path in checkpoints(out):
        policy = SimicPolicy.load(path)
        for i in range(number):
            instance = instances(i)
            episodes[int(path.name), i] = tasks[instance.task], laws, policy, instance, derive(seed, "held out", i)
    with closing(Journal(out / PLAYED)) as journal:
        played: dict[Key, dict[str, Any]] = {(entry["iteration"], entry["episode"]): entry for entry in journal.entries}
        missing = {key: episode for key, episode in episodes.items() if key not in played}
        if missing:
            candidates = counted(len(episodes) // number, "candidate")
            say(f"choose  among {candidates}, by {counted(number, 'held-out episode')} each")
        for (iteration, episode), reached in _played(missing, check):
            played[iteration, episode] = {"iteration": iteration, "episode": episode, **reached}
            journal.add(played[iteration, episode])
    return [played[key] for key in episodes]


def mean_losses(played: list[dict[str, Any]]) -> dict[int, float]:
    """Iteration → mean final loss of its held-out episodes, nats; infinite where one diverged."""
    losses: dict[int, list[float]] = {}
    for entry in played:
        losses.setdefault(entry["iteration"], []).append(math.inf if entry["diverged"] else entry["val_loss"])
    return {iteration: fmean(values) for iteration, values in losses.items()}


def _played(episodes: Mapping[Key, Episode], check: Callable[[], None]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """On text each on the cluster, as they end; on loss laws here, one after another."""
    import ray

    under_way = {}
    try:
        for key, episode in episodes.items():
            spec, data = episode[0]
            if data is None:
                check()
                yield key, held_out_episode(*episode)
            else:
                remote = ray.remote(held_out_episode).options(num_cpus=spec.fleet.cpus, num_gpus=spec.fleet.gpus)
                under_way[remote.remote(*episode)] = key
        while under_way:
            check()
            for reference in ray.wait(list(under_way), timeout=WAIT)[0]:
                yield under_way.pop(reference), ray.get(reference)
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)
