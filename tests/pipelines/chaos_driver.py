"""What test_chaos.py plays: a frozen policy over a fleet that trains real GPTs; also a driver that can be killed.

    python chaos_driver.py ADDRESS SPEC SHARDS FOLDER DECISIONS

connects to a cluster, goes on with the journal in FOLDER, and leaves the returns there once DECISIONS are collected.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from esper.pipelines.controllers.workers import make_run
from esper.platform.spec import FleetSpec, RunSpec
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import Fleet, RayFleet
from esper.policies.simic.net import ControllerNet
from esper.workers.candidates import telemetry_space
from esper.workers.worker import GrowthWorker

SEED = 11
WORKERS = 3


def ray_fleet(spec: RunSpec, shards: Path, folder: Path) -> RayFleet:
    """Workers that save below `folder`."""
    options = GrowthWorker.options(num_cpus=1)
    return RayFleet(lambda: options.remote(partial(make_run, spec, shards), str(folder / "saves")), lambda: WORKERS)


def dispatcher(spec: RunSpec, fleet: Fleet, folder: Path | None) -> Dispatcher:
    """A policy that grafts a lot, chosen by a seed; `folder` keeps the episodes."""
    torch.manual_seed(SEED)
    net = ControllerNet(16)
    with torch.no_grad():
        net.score[-1].weight.normal_(std=0.3)
    return Dispatcher(
        fleet,
        net,
        telemetry_space(spec),
        seed=SEED,
        ahead=10**6,
        limits=FleetSpec(grace=20),
        journal=None if folder is None else folder / "episodes",
    )


def returns(episodes) -> dict[int, float]:
    """Episode number → its return."""
    return {episode.number: float(episode.rewards.sum()) for episode in episodes}


def main(address: str, spec: str, shards: str, folder: str, decisions: str) -> None:
    """The driver."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    run_spec = RunSpec.model_validate_json(Path(spec).read_text())
    one = dispatcher(run_spec, ray_fleet(run_spec, Path(shards), Path(folder)), Path(folder))
    found = returns(one.collect(int(decisions)))
    flying = one.in_flight()
    one.stop()
    (Path(folder) / "returns.json").write_text(json.dumps({"returns": found, "in_flight": flying}))


if __name__ == "__main__":
    main(*sys.argv[1:])
