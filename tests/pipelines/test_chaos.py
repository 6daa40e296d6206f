"""Workers, a node and the driver are killed at random: every episode ends as it would have, and is learned from once.

On a Ray cluster of several nodes, with GrowthRuns that train. Alone: `pytest tests/pipelines/test_chaos.py`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import chaos_driver

from esper.policies.simic.fleet import LocalFleet
from esper.workers.run import GrowthRun
from esper.workers.worker import EpisodeWorker

DECISIONS = 200 if os.environ.get("ESPER_TEST_ALL") else 32


@pytest.fixture
def nodes():
    """A cluster of a head without cores and three nodes of one."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def kill_workers(folder: Path, every: int, over: threading.Event, killed: list[int]) -> None:
    """Kill a random worker's process each time the journal has grown by `every` decisions."""
    from ray._private.state import actors

    chance, last = random.Random(0), 0
    while not over.wait(0.05):
        pids = [actor["Pid"] for actor in actors().values() if actor["State"] == "ALIVE" and actor["Pid"]]
        if len(lines(folder)) >= last + every and pids:
            killed.append(chance.choice(pids))
            os.kill(killed[-1], signal.SIGKILL)
            last = len(lines(folder))


def lines(folder: Path) -> list[str]:
    """Of the journal: a decision each."""
    return [line for path in (folder / "episodes").glob("*.jsonl") for line in path.read_text().splitlines()]


def wait_until_ended(folder: Path, episodes: int) -> None:
    end = time.monotonic() + 300
    while sum('"terminated":true' in line for line in lines(folder)) < episodes:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def test_whatever_dies_every_episode_returns_what_it_would_have(nodes, tiny_spec, shards, tokens, tmp_path):
    spec = tiny_spec.overridden({"budget.amount": 400})  # decisions of half a second
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    arguments = [nodes.address, str(shards), str(tmp_path), str(DECISIONS)]
    command = [sys.executable, chaos_driver.__file__, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    driver = subprocess.Popen(command, env=environment)
    over, killed = threading.Event(), []
    killer = threading.Thread(target=kill_workers, args=(tmp_path, 12, over, killed), daemon=True)
    killer.start()
    try:
        wait_until_ended(tmp_path, 1)
        nodes.remove_node(next(iter(nodes.worker_nodes)))
        nodes.add_node(num_cpus=1)
        wait_until_ended(tmp_path, 2)
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
    one_worker = LocalFleet(lambda: EpisodeWorker(lambda: GrowthRun(spec, tokens)), 1)
    expected, _ = chaos_driver.collect(spec, one_worker, None, 8 * (max(found) + 1))
    assert len(set(expected.values())) == len(expected)
    assert found == {number: expected[number] for number in found}
