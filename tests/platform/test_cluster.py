"""A local Ray cluster comes and goes with its session, listens on 127.0.0.1 only, and does not die without a word."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.mlflow_servers import free_port

ROOT = Path(__file__).parents[2]

SESSION = """
import os, subprocess, sys
import esper.pipelines
from esper.platform import cluster
from esper.platform.errors import UserError
import psutil, ray

@ray.remote
def see():
    import only_here, platform
    from esper.platform import errors
    return only_here.VALUE, platform.system(), errors.__file__

with cluster.session(cpus=3):
    print(cluster.cores(), *ray.get(see.remote()))
    try:
        with cluster.session(gpus=99):  # one inside another neither starts nor ends anything
            pass
    except UserError as error:
        print(ray.is_initialized(), error)
    me = psutil.Process()
    listening = [
        connection.laddr
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    ]
    print(len(listening), {address.ip.removeprefix("::ffff:") for address in listening})
    inner = "from esper.platform import cluster\\nwith cluster.session(cpus=7): print(cluster.cores())"
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run([sys.executable, "-c", inner], env=env, capture_output=True, text=True)
    print(done.stdout.strip(), done.stderr.strip(), *ray.get(see.remote()))  # which ended nothing
print(ray.is_initialized())
"""


def driver(code: str, *arguments: str, paths: tuple[Path, ...] = (), **more: str) -> subprocess.Popen[str]:
    """One as a user runs it, in an unrelated folder with the clone on its PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *paths])), **more}
    command, pipe = [sys.executable, "-c", code, *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd="/", env=env, stdout=pipe, stderr=pipe, text=True)


def test_a_session_starts_a_cluster_on_this_machine_alone_shares_it_and_ends_it(tmp_path: Path):
    (tmp_path / "only_here.py").write_text("VALUE = 'found'\n")
    with driver(SESSION, paths=(tmp_path,), HOME="/proc/nothing") as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    seen, refused, listening, attached, after = out.splitlines()
    found = f"found {os.uname().sysname} {ROOT}/esper/platform/errors.py"
    assert seen == f"3 {found}"
    assert refused.startswith("True 99 GPUs asked for, but the Ray cluster has 0: ")
    count, _, addresses = listening.partition(" ")
    assert int(count) >= 6
    assert addresses == "{'127.0.0.1'}"
    assert attached.startswith("3 Ray: attached to 127.0.0.1:")
    assert attached.endswith(found)
    assert after == "False"
    assert err == "Ray: local cluster, 3 cores\n"  # and nothing of Ray's own


WRONG = """
import os, sys
from esper.platform import cluster
from esper.platform.errors import UserError

for address in sys.argv[1:]:
    os.environ["RAY_ADDRESS"] = address
    try:
        with cluster.session():
            pass
    except UserError as error:
        print(error)
"""


def test_a_wrong_ray_address_is_one_sentence_at_once():
    addresses = [f"127.0.0.1:{free_port()}", "nonsense"]
    with driver(WRONG, *addresses) as process:
        out, err = process.communicate(timeout=60)
    starts = [f"RAY_ADDRESS={address} leads to no Ray cluster (" for address in addresses]
    assert [line[: len(start)] for line, start in zip(out.splitlines(), starts, strict=True)] == starts
    assert err == ""


WORK = """
import esper.pipelines, signal, sys, time
from esper.platform import cluster
import ray

def stop(*_):
    if sys.argv[1] == "stops":
        raise KeyboardInterrupt

@ray.remote
def work():
    time.sleep(0.1)

cluster.GRACE_SECONDS = 2
with cluster.session(cpus=1):
    signal.signal(signal.SIGTERM, stop)
    ray.get(work.remote())
    print("works", flush=True)
    while True:
        try:
            ray.get(work.remote(), timeout=1)
        except ray.exceptions.RayError:
            time.sleep(0.1)
        except KeyboardInterrupt:
            sys.exit("stopped, with nothing lost")
"""


@pytest.mark.parametrize(("server", "kind"), [("gcs_server", "stops"), ("raylet", "hangs")])
def test_a_server_of_ray_s_that_is_killed_is_told_and_ends_the_driver_with_all_that_is_its(server: str, kind: str):
    with driver(WORK, kind) as process:
        assert process.stdout
        assert process.stdout.readline() == "works\n"
        family = psutil.Process(process.pid).children(recursive=True)
        killed = next(child for child in family if child.name() == server)
        killed.send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert time.monotonic() - began < 30
    assert f"error: Ray's {server} (process {killed.pid}) has died, killed or out of memory: this stops here" in said
    assert ("stopped, with nothing lost" in said) == (kind == "stops")
    _, left = psutil.wait_procs(family, timeout=20)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
