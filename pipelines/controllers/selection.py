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
from esper.pipelines.controllers.workers import make_run
from esper.platform.console import counted, say
from esper.platform.contracts import Instance
from esper.platform.journal import Journal
from esper.platform.ledger import AXES
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec
from esper.policies.simic.policy import SimicPolicy, checkpoints
from esper.workers.instances import in_turn

FILE = "heldout.jsonl"  # in the output folder, an episode a line: choosing can be gone on with
WAIT = 0.25  # seconds between two calls of `check`

Key = tuple[int, int]  # iteration, episode
Task = tuple[RunSpec, Path | None, Path | None, SimicPolicy, Instance, int]  # of `_episode`


def held_out(
    spec: RunSpec,
    data: Path | None,
    out: Path,
    seed: int,
    check: Callable[[], None],
    laws: Path | None = None,
    also: Sequence[tuple[RunSpec, Path]] = (),
) -> list[dict[str, Any]]:
    """`iteration`, `episode`, `val_loss`, `diverged` and ledger axes per held-out episode and checkpoint in `out`.

    `data`: None on loss laws, the spec's or fitted ones. `check` may raise; a later call continues. With further specs
    and data the episodes are of each in turn, one of each at least.
    """
    turns = [(spec, data), *also]
    number = spec.ppo.held_out and max(spec.ppo.held_out, len(turns))
    instances = in_turn("tuning", [each for each, _ in turns], text=data is not None)
    tasks: dict[Key, Task] = {}
    for path in checkpoints(out):
        policy = SimicPolicy.load(path)
        for i in range(number):
            instance = instances(i)
            tasks[int(path.name), i] = (*turns[instance.task], laws, policy, instance, derive(seed, "held out", i))
    with closing(Journal(out / FILE)) as journal:
        played: dict[Key, dict[str, Any]] = {(entry["iteration"], entry["episode"]): entry for entry in journal.entries}
        missing = {key: task for key, task in tasks.items() if key not in played}
        if missing:
            candidates = counted(len(tasks) // number, "candidate")
            say(f"choose  among {candidates}, by {counted(number, 'held-out episode')} each")
        for (iteration, episode), reached in _played(missing, check):
            played[iteration, episode] = {"iteration": iteration, "episode": episode, **reached}
            journal.add(played[iteration, episode])
    return [played[key] for key in tasks]


def mean_losses(played: list[dict[str, Any]]) -> dict[int, float]:
    """Iteration → mean final loss of its held-out episodes, nats; infinite where one diverged."""
    losses: dict[int, list[float]] = {}
    for entry in played:
        losses.setdefault(entry["iteration"], []).append(math.inf if entry["diverged"] else entry["val_loss"])
    return {iteration: fmean(values) for iteration, values in losses.items()}


def _episode(
    spec: RunSpec, data: Path | None, laws: Path | None, policy: SimicPolicy, instance: Instance, seed: int
) -> dict[str, Any]:
    run = make_run(spec, data, laws)
    run.reset(instance, seed)
    summary = play(run, policy, arm="ppo")
    return {name: summary[name] for name in ("val_loss", "diverged", *AXES)}


def _played(tasks: Mapping[Key, Task], check: Callable[[], None]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """On text each on the cluster, as they end; on loss laws here, one after another."""
    import ray

    under_way = {}
    try:
        for key, task in tasks.items():
            spec, data, *_ = task
            if data is None:
                check()
                yield key, _episode(*task)
            else:
                remote = ray.remote(_episode).options(num_cpus=spec.fleet.cpus, num_gpus=spec.fleet.gpus)
                under_way[remote.remote(*task)] = key
        while under_way:
            check()
            for reference in ray.wait(list(under_way), timeout=WAIT)[0]:
                yield under_way.pop(reference), ray.get(reference)
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)
