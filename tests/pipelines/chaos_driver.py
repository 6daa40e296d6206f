"""What test_chaos.py plays: a frozen policy over a fleet that trains real GPTs; also a driver that can be killed.

    python chaos_driver.py ADDRESS SHARDS FOLDER DECISIONS

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
from esper.workers.observe import telemetry_space
from esper.workers.worker import GrowthWorker


def collect(spec: RunSpec, fleet: Fleet, journal: Path | None, decisions: int) -> tuple[dict[int, float], list[int]]:
    """Returns by episode, and the episodes in flight, of a policy that grafts a lot."""
    torch.manual_seed(11)
    net = ControllerNet(16)
    with torch.no_grad():
        net.score[-1].weight.normal_(std=0.3)
    space, limits = telemetry_space(spec), FleetSpec(grace=20)
    dispatcher = Dispatcher(fleet, net, space, seed=11, ahead=10**6, limits=limits, journal=journal)
    returns = {episode.number: float(episode.rewards.sum()) for episode in dispatcher.collect(decisions)}
    in_flight = dispatcher.in_flight()
    dispatcher.stop()
    return returns, in_flight


def main(address: str, shards: str, folder: str, decisions: str) -> None:
    """The driver."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    spec, out = RunSpec.model_validate_json((Path(folder) / "spec.json").read_text()), Path(folder)
    arguments = (partial(make_run, spec, Path(shards)), str(out / "saves"))
    fleet = RayFleet(lambda: GrowthWorker.options(num_cpus=1).remote(*arguments), lambda: 3)
    returns, in_flight = collect(spec, fleet, out / "episodes", int(decisions))
    (out / "returns.json").write_text(json.dumps({"returns": returns, "in_flight": in_flight}))


if __name__ == "__main__":
    main(*sys.argv[1:])
