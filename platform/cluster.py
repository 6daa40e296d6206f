"""The Ray cluster a pipeline runs on: the one `RAY_ADDRESS` names (`ray job submit` sets it), else one started here.

Ray is imported where needed: `--help` needs none. A cluster started here listens on 127.0.0.1 only and asks for Ray's
token (`~/.ray/auth_token`; not the monitor's metrics), unless Ray was imported before `esper.pipelines`.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from esper.platform.console import counted, say
from esper.platform.errors import UserError, in_a_sentence

LOCAL = {  # read by Ray when it is imported; what the user has set stays
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's way to say: one machine only, so listen on 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers, and no notice about it
    "RAY_enable_metrics_collection": "0",  # nobody scrapes a laptop's Prometheus metrics, and failing exports are loud
}
PROBE_SECONDS = 5  # an address that nothing listens on is found out by this; Ray itself goes on trying for minutes
SERVERS = ("gcs_server", "raylet")  # without one of them a driver hangs, and is then ended by Ray without a word
LOOK_SECONDS, GRACE_SECONDS = 0.5, 15  # between two looks at them; to stop in, once one has died


def prepare() -> None:
    """Set Ray's environment, unless `RAY_ADDRESS` names a cluster; call before Ray is imported."""
    if not attached():
        for name, value in LOCAL.items():
            os.environ.setdefault(name, value)
        if not os.access(Path.home(), os.W_OK):  # where Ray would put the token that it makes
            os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)


@contextlib.contextmanager
def session(cpus: int | None = None, gpus: int | None = None) -> Iterator[None]:
    """Have a cluster for a block; one that is started for it is shut down at its end.

    Where a server of a cluster started here dies, this process says so and stops. `cpus` are the cores of a cluster
    started here, by default this machine's; `gpus` are those the caller will use, by default what is there. UserError
    where `RAY_ADDRESS` leads to no cluster, or the cluster has fewer GPUs.
    """
    prepare()
    import ray

    with contextlib.ExitStack() as ending:
        if not ray.is_initialized():
            quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
            if attached():
                where = _attach(os.environ["RAY_ADDRESS"], quiet)
            else:  # never a cluster that happens to be recorded in /tmp/ray
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
                where = "local cluster"
            ending.enter_context(_watched())
            say(f"Ray: {where}, {counted(cores(), 'core')}" + (f", {counted(_gpus(), 'GPU')}" if _gpus() else ""))
        if gpus is not None and gpus > _gpus():
            what = f"{counted(gpus, 'GPU')} asked for, but the Ray cluster has {_gpus()}"
            raise UserError(f"{what}: choose a CPU preset, or run on a cluster with enough of them (RAY_ADDRESS).")
        yield


def attached() -> bool:
    """Whether `RAY_ADDRESS` names a cluster, which may grow."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def cores(resource: str = "CPU") -> int:
    """Cores of the connected cluster, or how many it has of another resource."""
    import ray

    return int(ray.cluster_resources().get(resource, 0))


def _gpus() -> int:
    return cores("GPU")


def room(cpus: float, gpus: float, taken: tuple[float, float] = (0, 0)) -> int:
    """Processes of this many cores and GPUs that fit the cluster at once, beside `taken` (cores, GPUs); may be 0."""
    there = ((cores(), taken[0], cpus), (_gpus(), taken[1], gpus))
    return min((int(max(0.0, have - others) / need) for have, others, need in there if need), default=cores())


def fit(cpus: float, gpus: float, taken: tuple[float, float] = (0, 0)) -> int:
    """`room`; raises UserError where it is 0: Ray would wait for ever."""
    if count := room(cpus, gpus, taken):
        return count
    raise UserError(
        f"a process of {counted(cpus, 'core')} and {counted(gpus, 'GPU')} does not fit a cluster of "
        f"{counted(cores(), 'core')} and {counted(_gpus(), 'GPU')}: set fleet.cpus or fleet.gpus lower."
    )


def _attach(address: str, options: dict[str, Any]) -> str:
    import ray

    mend = "start one with `ray start --head`, whose host:6379 it takes (not the dashboard's address), or unset"
    with in_a_sentence(f"RAY_ADDRESS={address} leads to no Ray cluster", f"{mend} RAY_ADDRESS to run on this machine"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdigit():
            socket.create_connection((host, int(port)), PROBE_SECONDS).close()
        ray.init(address=address, **options)
    return f"attached to {ray.get_runtime_context().gcs_address}"


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Disconnect at the block's end, unless a server has died: Ray would hang, and `_watch` ends this process."""
    import ray

    servers = {process: process.name() for process in psutil.Process().children() if process.name() in SERVERS}
    over = threading.Event()
    threading.Thread(target=_watch, args=[servers, over], name="Ray's servers", daemon=True).start()
    try:
        yield
    finally:
        if not psutil.wait_procs(servers, timeout=0)[0]:
            over.set()
            ray.shutdown()


def _watch(servers: dict[psutil.Process, str], over: threading.Event) -> None:
    """Once a server has died, stop this process by SIGTERM; where that does not, kill it and Ray's processes."""
    while not (dead := psutil.wait_procs(servers, timeout=0)[0]):
        if over.wait(LOOK_SECONDS):
            return
    what = f"error: Ray's {servers[dead[0]]} (process {dead[0].pid}) has died, killed or out of memory"
    say(f"{what}: this stops here; go on with --resume once there is room.")
    os.kill(os.getpid(), signal.SIGTERM)
    if not over.wait(GRACE_SECONDS):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(1)
