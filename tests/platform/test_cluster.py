"""A local Ray cluster comes and goes with its session, says one line, and its workers import what the driver does.

Each test runs a driver of its own, as a user would. Alone: `pytest tests/platform/test_cluster.py` (about 40 s).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SESSION = """
import os, ray
from esper.platform import cluster
from esper.platform.errors import UserError

@ray.remote(num_cpus=0)
def see():
    import only_here, platform
    from esper.platform import errors
    return only_here.VALUE, platform.system(), errors.__file__

with cluster.session(cpus=3):
    print(cluster.cores(), *ray.get(see.remote()))
    with cluster.session():  # one inside another neither starts nor ends anything
        pass
    print(ray.is_initialized())
    try:
        cluster.connect(gpus=99)
    except UserError as error:
        print(error)
    attached = ray.get_runtime_context().gcs_address
    print(attached)
print(ray.is_initialized(), cluster.cores() == len(os.sched_getaffinity(0)))
"""


def drive(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a driver from an unrelated folder, the clone on its PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *paths])), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_session_starts_a_cluster_shares_the_path_and_ends_it(tmp_path: Path):
    (tmp_path / "only_here.py").write_text("VALUE = 'found'\n")
    done = drive(SESSION, tmp_path)
    assert done.returncode == 0, done.stderr
    system = os.uname().sysname
    seen, inside, refused, _, after = done.stdout.splitlines()
    assert seen == f"3 found {system} {ROOT}/esper/platform/errors.py"
    assert inside == "True"
    assert refused.startswith("99 GPUs asked for, but the Ray cluster has 0: ")
    assert after == "False True"
    assert done.stderr == "Ray: local cluster, 3 cores\n"  # and nothing of Ray's own


def test_ray_address_attaches_and_leaves_the_cluster_running():
    inner = "from esper.platform import cluster\nwith cluster.session(cpus=7): print(cluster.cores())"
    outer = f"""
import os, subprocess, sys, ray
from esper.platform import cluster
with cluster.session(cpus=2):
    env = os.environ | {{"RAY_ADDRESS": ray.get_runtime_context().gcs_address}}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", {inner!r}], env=env, capture_output=True, text=True)
        print(done.stdout + done.stderr)
"""
    done = drive(outer)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[::2] == ["2", "2"]
    for line in lines[1::2]:
        assert line.startswith("Ray: attached to ")
        assert line.endswith(", 2 cores")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:PORT", "leads to no Ray cluster (["),
        ("nonsense", "leads to no Ray cluster (Invalid address format: nonsense): start one with `ray start --head`"),
        ("http://127.0.0.1:8265", "is a dashboard's address, not a cluster's: submit with `ray job submit --address"),
    ],
)
def test_a_wrong_ray_address_is_one_sentence_at_once(address: str, sentence: str):
    code = """
from esper.platform import cluster
from esper.platform.errors import UserError
try:
    cluster.connect()
except UserError as error:
    print(error)
"""
    address = address.replace("PORT", str(_free_port()))
    done = drive(code, RAY_ADDRESS=address)
    assert done.stdout.startswith(f"RAY_ADDRESS={address} {sentence}"), done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
