"""Trains a controller: PPO iterations over a fleet, with a live view, tracking, checkpoints and a summary.

`esper ppo --resume` continues after the last decision. The policy that `selection.py` chooses is the result.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field
from ray.rllib.algorithms.ppo import PPO

from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.controllers.live import TrainingView
from esper.pipelines.controllers.selection import held_out, mean_losses
from esper.pipelines.controllers.training_picture import training_picture
from esper.pipelines.controllers.workers import fleet_maker
from esper.platform.checkpoint import CheckpointStore, below
from esper.platform.console import say
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.journal import Journal
from esper.platform.ledger import AXES
from esper.platform.spec import RunSpec
from esper.platform.storage import write_json
from esper.platform.tracking import Tracker, milliseconds, synced
from esper.platform.tracking_store import tracking_uri
from esper.policies.simic.health import Health
from esper.policies.simic.learner import build_algorithm, iteration_metrics, runner, save_algorithm
from esper.policies.simic.policy import CHECKPOINTS, FILE, SimicPolicy, checkpoints
from esper.workers.candidates import telemetry_space
from esper.workers.instances import instance_set
from esper.workers.worker import save_name

CANDIDATES = 5  # policies of a training, evenly apart, whose checkpoints stay; of the others only the newest
HISTORY, EPISODES, SAVES = "history.jsonl", "episodes", "saves"  # in the output folder
ON_LAWS = {"ppo.iterations": 80, "ppo.decisions": 1024, "ppo.minibatch": 256, "ppo.held_out": 16}  # enough there

OWN = ("iteration", "time")  # what a line of the history has beside the metrics
COUNTED = (
    "everything that GPTs were trained for: episodes learned from, in flight and dropped, and held-out ones; not what "
    "was trained twice after a worker's death"
)


class Reached(Frozen):
    """A training's progress: `extra` in the card of each checkpoint's policy."""

    key: str  # of the training
    preset: str
    seed: int
    surrogate: bool
    iterations: int = Field(default=0, ge=0)
    episodes: float = 0.0
    decisions: float = 0.0
    last: dict[str, float | None] | None = None  # the entry of its last iteration in the history

    @classmethod
    def of(cls, folder: RunFolder) -> Self:
        """The newest checkpoint's progress, or the start's; UserError for another training's checkpoint."""
        there = checkpoints(folder.out)
        if not there:
            spec = folder.spec
            return cls(key=folder.key, preset=spec.preset, seed=folder.seed, surrogate=folder.data is None)
        reached = cls.checked(SimicPolicy.load(there[-1]).card["extra"], f"the card of {there[-1]}")
        if reached.key != folder.key:
            raise UserError(f"checkpoint {there[-1]} is another training's: put back the one that was there.")
        return reached

    def after(self, metrics: dict[str, float]) -> Self:
        """The progress one iteration later."""
        done = {name: getattr(self, name) + metrics[name] for name in ("episodes", "decisions")}
        last = {"iteration": self.iterations + 1, "time": milliseconds(), **metrics}
        return self.model_copy(update={"iterations": self.iterations + 1, "last": _as_json(last), **done})


class History:
    """Metrics per iteration: in `history.jsonl`, where null stands for non-finite values, and in MLflow."""

    def __init__(self, out: Path, tracker: Tracker) -> None:
        self._journal, self._tracker = Journal(out / HISTORY, lambda entry: entry["iteration"]), tracker
        self.entries = list(self._journal.entries)  # iteration, time stamp in milliseconds, metrics

    def rows(self) -> list[dict[str, float]]:
        """The entries, with NaN for null."""
        return [{k: math.nan if v is None else v for k, v in entry.items()} for entry in self.entries]

    def add(self, entry: dict[str, Any]) -> None:
        """Record an iteration, once."""
        if self._journal.add(entry):
            self.entries.append(entry)
        metrics = {name: value for name, value in entry.items() if name not in OWN and value is not None}
        self._tracker.log(metrics, entry["iteration"], at=entry["time"])


def train_controller(
    folder: RunFolder, *, parent: Tracker | None = None, check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train on the connected cluster, or resume, and return the summary, also left in the folder.

    A folder without data trains on loss laws. `check` is called often and may raise; the training can be resumed.
    """
    out, surrogate = folder.out, folder.data is None
    spec = folder.spec.overridden({"budget.cooldowns": []})  # no controller learns from a fork's loss
    storage = str(out / SAVES) if spec.fleet.storage is None else below(spec.fleet.storage, folder.key)
    there = checkpoints(out)
    reached = Reached.of(folder)
    (out / "summary.json").unlink(missing_ok=True)  # of a training that is given more iterations
    (out / FILE).unlink(missing_ok=True)
    with track(folder, parent) as tracker:
        say(f"ppo     {spec.ppo.iterations} iterations of {spec.ppo.decisions} decisions; building the learner")
        history = History(out, tracker)
        if reached.last is not None:
            history.add(reached.last)  # the process may have died before it was noted
        algorithm = build_algorithm(
            spec,
            telemetry_space(spec),
            fleet_maker(spec, folder.data, storage),
            seed=folder.seed,
            instances=_instances(spec) if surrogate else None,
            journal=out / EPISODES,
            check=check,
            start=there[-1] if there else None,
        )
        dispatcher = runner(algorithm).dispatcher
        try:
            reached = _iterate(algorithm, spec.ppo.iterations, out, reached, history)
        finally:
            algorithm.stop()
        played = held_out(_candidates(out), spec, folder.data, out, folder.seed, check)
        losses = mean_losses(played)
        best = min(losses, key=lambda iteration: (losses[iteration], -iteration), default=reached.iterations)
        in_flight, dropped = dispatcher.in_flight(), dispatcher.dropped
        summary = {
            **reached.model_dump(mode="json", exclude={"last"}),
            "episode_return_mean": history.entries[-1]["return_mean"],
            "checkpoint": str(_checkpoint(out, best)),
            "best_iteration": best,
            "held_out_losses": _as_json(losses),
            "in_flight": in_flight,
            "dropped": dropped,
            **_spent({} if surrogate else {**dispatcher.spent(), "held_out": _totals(played)}),
            "mlflow": tracker.run_id,
            "history": history.entries,
        }
        if not surrogate:
            with CheckpointStore(storage) as saves:
                saves.keep_only(map(save_name, in_flight))
        shutil.copyfile(_checkpoint(out, best) / FILE, out / FILE)
        rows = [row | {"held_out_loss": losses.get(int(row["iteration"]), math.nan)} for row in history.rows()]
        training_picture(rows, out / "training.png")
        write_json(out / "summary.json", summary)
        for iteration, loss in losses.items():
            tracker.log({"held_out_loss": loss}, iteration)
        keep(folder, tracker)
    if in_flight:
        say(f"saved   {len(in_flight)} episodes in flight, for a training that goes on")
    if dropped:
        say(f"dropped {len(dropped)} episodes: {', '.join(map(str, dropped))}")
    if losses:
        say(
            f"best    iteration {best}, held-out loss {losses[best]:.4f}; the last has {losses[reached.iterations]:.4f}"
        )
    say(f"policy  {out / FILE}; use it with: esper train ppo --policy {out}")
    return {**summary, "where": tracker.where}


def track(folder: RunFolder, parent: Tracker | None = None) -> Tracker:
    """The tracker of a training's MLflow run."""
    name = folder.out.name if parent is None else f"{folder.out.parent.name}-{folder.out.name}"
    tags = {"kind": "ppo", "arm": "ppo"}
    return folder.track(tags, experiment="esper-controllers", run_name=name, parent=parent)


def keep(folder: RunFolder, tracker: Tracker) -> None:
    """Keep a training's results with its run in MLflow."""
    for name in ("summary.json", "training.png"):
        tracker.artifact(folder.out / name)
    tracker.artifact(folder.out / FILE)


def send(folder: RunFolder) -> bool:
    """Send MLflow what it lacks of an ended training, or raise UserError; False where it lacks nothing."""
    if synced(folder.out, tracking_uri()):
        return False
    tracker = track(folder)
    keep(folder, tracker)
    if not tracker.close(ended=int((folder.out / "summary.json").stat().st_mtime * 1000)):
        raise UserError(f"MLflow did not take everything of the training in {folder.out}: try again once it is there.")
    say(f"MLflow has had everything of the training in {folder.out} now.")
    return True


def _iterate(algorithm: PPO, iterations: int, out: Path, reached: Reached, history: History) -> Reached:
    """Train to the last iteration, a checkpoint after each."""
    health = Health(iterations)
    for row in history.rows():
        health.look({name: value for name, value in row.items() if name not in OWN})  # said already
    with TrainingView(iterations, reached.iterations, runner(algorithm).dispatcher.workers) as view:
        while reached.iterations < iterations:
            metrics = iteration_metrics(algorithm.train())
            reached = reached.after(metrics)
            _save(algorithm, out, reached, every=math.ceil(iterations / CANDIDATES))
            history.add(reached.last or {})
            view.iteration(reached.iterations, metrics)
            for warning in health.look(metrics):
                say(f"warning: {warning}")
    return reached


def _save(algorithm: PPO, out: Path, reached: Reached, every: int) -> None:
    """Write a checkpoint and remove earlier ones, except the newest and every `every`-th."""
    checkpoint = _checkpoint(out, reached.iterations)
    try:
        save_algorithm(algorithm, checkpoint, reached.model_dump(mode="json"))
    except OSError as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be written ({error.strerror or error}): make room, and go on with "
            f"`esper ppo --resume {out}`."
        ) from error
    for path in checkpoints(out)[:-1]:
        if int(path.name) % every:
            shutil.rmtree(path, ignore_errors=True)


def _checkpoint(out: Path, iteration: int) -> Path:
    return out / CHECKPOINTS / f"{iteration:06d}"


def _candidates(out: Path) -> dict[int, Path]:
    return {int(path.name): path for path in checkpoints(out)}


def _instances(spec: RunSpec) -> Callable[[int], Instance]:
    instances = list(instance_set("train", spec).values())
    return lambda number: instances[number % len(instances)]


def _spent(parts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Totals and parts per ledger axis; zero on loss laws."""
    whole = {name: {axis: part.get(axis, 0.0) for axis in AXES} for name, part in parts.items()}
    total = {axis: sum(part[axis] for part in whole.values()) for axis in AXES}
    return {"spent": total, "spent_on": whole, "spent_counts": COUNTED if parts else "nothing: no GPT was trained"}


def _totals(played: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {axis: sum(entry[axis] for entry in played) for axis in AXES}


def _as_json(values: Mapping[Any, float]) -> dict[Any, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
