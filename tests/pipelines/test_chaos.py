"""Workers, a node and the driver are killed at random: every episode ends as it would have, and is learned from once.

On a Ray cluster of several nodes, with a frozen policy and GrowthRuns that train, GPTs or ResNets. Alone:
`pytest tests/pipelines/test_chaos.py`. As a program it is a driver that can be killed, `python test_chaos.py ADDRESS
DATA FOLDER`: it goes on with the journal in FOLDER, and leaves the returns there in the end.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from esper.pipelines.controllers.workers import make_run
from esper.platform.spec import FleetSpec, RunSpec
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import Fleet, LocalFleet, RayFleet
from esper.workers.observe import telemetry_space
from esper.workers.run import GrowthRun
from esper.workers.worker import EpisodeWorker, GrowthWorker
from tests.pipelines.helpers import made_net, wait_for

DECISIONS = 200 if os.environ.get("ESPER_TEST_ALL") else 24


def collect(spec: RunSpec, fleet: Fleet, journal: Path | None, decisions: int) -> tuple[dict[int, float], list[int]]:
    """Returns by episode, and the episodes in flight."""
    net, space, limits = made_net(11, 0.3), telemetry_space(spec), FleetSpec(grace=20)
    dispatcher = Dispatcher(fleet, net, space, seed=11, ahead=10**6, limits=limits, journal=journal)
    returns = {episode.number: float(episode.rewards.sum()) for episode in dispatcher.collect(decisions)}
    in_flight = dispatcher.in_flight()
    dispatcher.stop()
    return returns, in_flight


def drive(address: str, data: str, folder: str) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    out = Path(folder)
    spec = RunSpec.model_validate_json((out / "spec.json").read_text())
    arguments = (partial(make_run, (spec, Path(data))), str(out / "saves"))
    fleet = RayFleet(lambda: GrowthWorker.options(num_cpus=1).remote(*arguments), lambda: 2)
    returns, in_flight = collect(spec, fleet, out / "episodes", DECISIONS)
    (out / "returns.json").write_text(json.dumps({"returns": returns, "in_flight": in_flight}))


@pytest.fixture
def nodes():
    """A cluster of a head without cores and two nodes of one."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def lines(folder: Path) -> list[str]:
    """Of the journal: a decision each."""
    return [line for path in (folder / "episodes").glob("*.jsonl") for line in path.read_text().splitlines()]


def ended(folder: Path) -> int:
    return sum('"terminated":true' in line for line in lines(folder))


def kill_workers(folder: Path, every: int, over: threading.Event, killed: list[int]) -> None:
    """Kill a random worker's process each time the journal has grown by `every` decisions."""
    from ray._private.state import actors

    chance, last = random.Random(0), 0
    while not over.wait(0.05):
        if len(lines(folder)) < last + every:
            continue
        if pids := [actor["Pid"] for actor in actors().values() if actor["State"] == "ALIVE" and actor["Pid"]]:
            killed.append(chance.choice(pids))
            os.kill(killed[-1], signal.SIGKILL)
            last = len(lines(folder))


# What ResNets save and go on with is in test_worker.py, and in the slow one.
@pytest.mark.parametrize("domain", ["text", pytest.param("images", marks=pytest.mark.slow)])
def test_whatever_dies_every_episode_returns_what_it_would_have(nodes, small_spec, data, tmp_path):
    spec = small_spec.overridden({"budget.amount": 400})  # decisions of half a second
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, __file__, nodes.address, str(data.path), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    driver = subprocess.Popen(command, env=environment)
    over, killed = threading.Event(), []
    killer = threading.Thread(target=kill_workers, args=(tmp_path, 8, over, killed), daemon=True)
    killer.start()
    try:
        wait_for(lambda: len(lines(tmp_path)) >= 4)
        nodes.remove_node(next(iter(nodes.worker_nodes)))
        nodes.add_node(num_cpus=1)
        wait_for(lambda: ended(tmp_path) >= 1)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert not (tmp_path / "returns.json").exists()
        driver = subprocess.Popen(command, env=environment)
        assert driver.wait(timeout=900) == 0
    finally:
        over.set()
        killer.join()
        driver.kill()
    assert len(killed) >= 2
    result = json.loads((tmp_path / "returns.json").read_text())
    found = {int(number): value for number, value in result["returns"].items()}
    assert len(found) == DECISIONS // 8
    assert sorted({*found, *result["in_flight"]}) == list(range(len(found) + len(result["in_flight"])))
    one_worker = LocalFleet(lambda: EpisodeWorker(lambda: GrowthRun(spec, data)), 1)
    expected, _ = collect(spec, one_worker, None, 8 * (max(found) + 1))
    assert len(set(expected.values())) == len(expected)
    assert found == {number: expected[number] for number in found}


if __name__ == "__main__":
    drive(*sys.argv[1:])
