"""Selects a training's best policy by its mean final loss over held-out episodes, the same for all candidates.

They are the tuning set's instances, on text and on loss laws alike.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

from esper.pipelines.common.play import play
from esper.pipelines.controllers.workers import Task, make_run
from esper.platform.console import counted, say
from esper.platform.contracts import Instance
from esper.platform.journal import Journal
from esper.platform.ledger import AXES
from esper.platform.seeding import derive
from esper.policies.simic.policy import SimicPolicy, checkpoints
from esper.workers.instances import in_turn

FILE = "heldout.jsonl"  # in the output folder, an episode a line: choosing can be gone on with
WAIT = 0.25  # seconds between two calls of `check`

Key = tuple[int, int]  # iteration, episode
Episode = tuple[Task, Path | None, SimicPolicy, Instance, int]  # the arguments of `_episode`


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
    with closing(Journal(out / FILE)) as journal:
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


def _episode(task: Task, laws: Path | None, policy: SimicPolicy, instance: Instance, seed: int) -> dict[str, Any]:
    run = make_run(task, laws)
    run.reset(instance, seed)
    summary = play(run, policy, arm="ppo")
    return {name: summary[name] for name in ("val_loss", "diverged", *AXES)}


def _played(episodes: Mapping[Key, Episode], check: Callable[[], None]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """On text each on the cluster, as they end; on loss laws here, one after another."""
    import ray

    under_way = {}
    try:
        for key, episode in episodes.items():
            spec, data = episode[0]
            if data is None:
                check()
                yield key, _episode(*episode)
            else:
                remote = ray.remote(_episode).options(num_cpus=spec.fleet.cpus, num_gpus=spec.fleet.gpus)
                under_way[remote.remote(*episode)] = key
        while under_way:
            check()
            for reference in ray.wait(list(under_way), timeout=WAIT)[0]:
                yield under_way.pop(reference), ray.get(reference)
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)
