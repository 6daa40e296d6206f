"""Selects a training's best policy by its mean final loss over held-out episodes, the same for all candidates.

On text their seeds are used nowhere else; on loss laws they are the tuning set's instances.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from esper.pipelines.common.play import play
from esper.pipelines.controllers.workers import make_run
from esper.platform.console import say
from esper.platform.contracts import Instance
from esper.platform.journal import Journal
from esper.platform.ledger import AXES
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec
from esper.policies.simic.policy import SimicPolicy
from esper.workers.instances import instance_set

FILE = "heldout.jsonl"  # in the output folder, an episode a line: choosing can be gone on with
WAIT = 0.25  # seconds between two calls of `check`

Key = tuple[int, int]  # iteration, episode


def held_out(
    candidates: Mapping[int, Path], spec: RunSpec, data: Path | None, out: Path, seed: int, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """`iteration`, `episode`, `val_loss`, `diverged` and ledger axes per held-out episode and candidate.

    `candidates`: iteration → checkpoint. `data`: None on loss laws. `check` may raise; a later call continues.
    """
    number = spec.ppo.held_out
    instances = [Instance()] * number if data else list(islice(instance_set("tuning", spec).values(), number))
    policies = {iteration: SimicPolicy.load(path) for iteration, path in candidates.items()}
    tasks = {
        (iteration, i): partial(_episode, spec, data, policy, instance, derive(seed, "held out", i))
        for iteration, policy in policies.items()
        for i, instance in enumerate(instances)
    }
    journal = Journal(out / FILE, _key)
    played = {_key(entry): entry for entry in journal.entries}
    missing = {key: task for key, task in tasks.items() if key not in played}
    if missing:
        say(f"choose  {len(policies)} policies play {len(instances)} held-out episodes each")
    for key, reached in _here(missing, check) if data is None else _on_cluster(missing, spec, check):
        played[key] = dict(zip(("iteration", "episode"), key, strict=True)) | reached
        journal.add(played[key])
    journal.close()
    return [played[key] for key in tasks]


def mean_losses(played: list[dict[str, Any]]) -> dict[int, float]:
    """Iteration → mean final loss of its held-out episodes, nats; infinite where one diverged."""
    losses: dict[int, list[float]] = {}
    for entry in played:
        losses.setdefault(entry["iteration"], []).append(math.inf if entry["diverged"] else entry["val_loss"])
    return {iteration: fmean(values) for iteration, values in losses.items()}


def _episode(spec: RunSpec, data: Path | None, policy: SimicPolicy, instance: Instance, seed: int) -> dict[str, Any]:
    run = make_run(spec, data)
    run.reset(instance, seed)
    summary = play(run, policy, arm="ppo")
    return {name: summary[name] for name in ("val_loss", "diverged", *AXES)}


def _here(
    tasks: Mapping[Key, Callable[[], dict[str, Any]]], check: Callable[[], None]
) -> Iterator[tuple[Key, dict[str, Any]]]:
    for key, task in tasks.items():
        check()
        yield key, task()


def _on_cluster(
    tasks: Mapping[Key, Callable[[], dict[str, Any]]], spec: RunSpec, check: Callable[[], None]
) -> Iterator[tuple[Key, dict[str, Any]]]:
    import ray

    remote = ray.remote(_call).options(num_cpus=spec.fleet.cpus, num_gpus=spec.fleet.gpus)
    under_way = {remote.remote(task): key for key, task in tasks.items()}
    try:
        while under_way:
            check()
            for reference in ray.wait(list(under_way), timeout=WAIT)[0]:
                yield under_way.pop(reference), ray.get(reference)
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)


def _call(task: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return task()


def _key(entry: Mapping[str, Any]) -> Key:
    return entry["iteration"], entry["episode"]
