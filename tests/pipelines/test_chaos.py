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


@pytest.fixture
def spec(tiny_spec):
    """Decisions of half a second."""
    return tiny_spec.model_copy(update={"budget": tiny_spec.budget.model_copy(update={"amount": 400})})


def undisturbed(spec, tokens, decisions: int) -> dict[int, float]:
    """Returns by episode of the same policy over one worker in this process."""
    fleet = LocalFleet(lambda: EpisodeWorker(lambda: GrowthRun(spec, tokens)), 1)
    return chaos_driver.returns(chaos_driver.dispatcher(spec, fleet, None).collect(decisions))


class Killer(threading.Thread):
    """Kills a random worker's process each time the journal has grown by `every` decisions, until told to stop."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(daemon=True)
        self._folder, self._every, self._over = folder, every, threading.Event()
        self.killed = 0

    def run(self) -> None:
        chance, last = random.Random(0), 0
        while not self._over.wait(0.05):
            if decided(self._folder) >= last + self._every and (pids := worker_pids()):
                os.kill(chance.choice(pids), signal.SIGKILL)
                last = decided(self._folder)
                self.killed += 1

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.killed


def worker_pids() -> list[int]:
    """Processes of the cluster's actors that are up."""
    from ray._private.state import actors

    return [actor["Pid"] for actor in actors().values() if actor["State"] == "ALIVE" and actor["Pid"]]


def decided(folder: Path) -> int:
    """Decisions in the journal."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "episodes").glob("*.jsonl"))


def test_whatever_dies_every_episode_returns_what_it_would_have(nodes, spec, shards, tokens, tmp_path):
    decisions = 32
    expected = undisturbed(spec, tokens, decisions)
    assert len(set(expected.values())) == len(expected)
    one = chaos_driver.dispatcher(spec, chaos_driver.ray_fleet(spec, shards, tmp_path), tmp_path)
    killer = Killer(tmp_path, every=10)
    killer.start()
    try:
        found = chaos_driver.returns(one.collect(decisions // 3))
        nodes.remove_node(next(iter(nodes.worker_nodes)))
        nodes.add_node(num_cpus=1)
        found |= chaos_driver.returns(one.collect(decisions - 8 * len(found)))
    finally:
        killed = killer.stop()
        one.stop()
    assert killed >= 2
    assert one.counts["failures"] >= 3
    assert one.dropped == []
    assert sorted({*found, *one.in_flight()}) == list(range(one.next_episode))
    expected |= undisturbed(spec, tokens, 8 * (max(found) + 1)) if max(found) not in expected else {}
    assert found == {number: expected[number] for number in found}


@pytest.mark.slow
def test_200_decisions_while_workers_a_node_and_the_driver_are_killed(nodes, spec, shards, tokens, tmp_path):
    decisions = 200
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    arguments = [nodes.address, str(tmp_path / "spec.json"), str(shards), str(tmp_path), str(decisions)]
    command = [sys.executable, chaos_driver.__file__, *arguments]

    def start():
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})

    driver = start()
    killer = Killer(tmp_path, every=15)
    killer.start()
    try:
        wait_for(lambda: ended(tmp_path) >= 5)
        nodes.remove_node(next(iter(nodes.worker_nodes)))
        nodes.add_node(num_cpus=1)
        wait_for(lambda: ended(tmp_path) >= 10)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert not (tmp_path / "returns.json").exists()
        driver = start()
        assert driver.wait(timeout=900) == 0
    finally:
        killed = killer.stop()
        driver.kill()
    assert killed >= 5
    result = json.loads((tmp_path / "returns.json").read_text())
    found = {int(number): value for number, value in result["returns"].items()}
    assert len(found) == decisions // 8
    expected = undisturbed(spec, tokens, 8 * (max(found) + 1))
    assert found == {number: expected[number] for number in found}
    assert sorted({*found, *result["in_flight"]}) == list(range(len(found) + len(result["in_flight"])))


def ended(folder: Path) -> int:
    """Episodes in the journal that have ended."""
    return sum('"ended"' in path.read_text().splitlines()[-1] for path in (folder / "episodes").glob("*.jsonl"))


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
