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
from contextlib import contextmanager
from pathlib import Path

import psutil

from esper.platform.console import counted, say
from esper.platform.errors import UserError

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


def connect(cpus: int | None = None, gpus: int | None = None) -> None:
    """Attach to the cluster of `RAY_ADDRESS`, or start one here, and say which in a line.

    Where connected already, only `gpus` is checked. Workers get the driver's `sys.path` and print to Ray's log folder.
    Raises UserError where `RAY_ADDRESS` leads to no cluster, or it has fewer GPUs than `gpus`.

    Args:
        cpus: cores of a cluster started here; None takes this machine's.
        gpus: GPUs the caller will use: 0 hides those of a local cluster, None takes what is there.
    """
    prepare()
    import ray

    if not ray.is_initialized():
        if attached():
            _attach(os.environ["RAY_ADDRESS"])
        else:
            ray.init(
                address="local",  # never a cluster that happens to be recorded in /tmp/ray
                num_cpus=cpus,
                num_gpus=0 if gpus == 0 else None,  # a number would be believed; None counts the devices
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        where = f"attached to {ray.get_runtime_context().gcs_address}" if attached() else "local cluster"
        say(f"Ray: {where}, {counted(cores(), 'core')}" + (f", {counted(_gpus(), 'GPU')}" if _gpus() else ""))
    if gpus is not None and gpus > _gpus():
        raise UserError(
            f"{counted(gpus, 'GPU')} asked for, but the Ray cluster has {_gpus()}: choose a CPU preset, or run on a "
            "cluster with enough of them (RAY_ADDRESS)."
        )


@contextmanager
def session(cpus: int | None = None, gpus: int | None = None) -> Iterator[None]:
    """`connect` for a block; at its end a cluster started here is shut down, an attached one left.

    An earlier connection stays. Where a server of a cluster started here dies, this process says so and stops.
    """
    prepare()
    import ray

    if ray.is_initialized():
        connect(cpus, gpus)
        yield
        return
    over = threading.Event()
    servers: list[psutil.Process] = []
    try:
        connect(cpus, gpus)
        servers += [process for process in psutil.Process().children() if process.name() in SERVERS]
        threading.Thread(target=_watch, args=[servers, over], name="Ray's servers", daemon=True).start()
        yield
    finally:
        if all(_lives(process) for process in servers):  # or else it would hang: `_watch` ends this process
            over.set()
            ray.shutdown()


def cores() -> int:
    """Cores of the connected cluster; without one, the cores this process may use."""
    import ray

    if ray.is_initialized():
        return int(ray.cluster_resources().get("CPU", 0))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def attached() -> bool:
    """Whether `RAY_ADDRESS` names a cluster, which may grow."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def room(each_cpus: float, each_gpus: float, taken: tuple[float, float] = (0, 0)) -> int:
    """Processes of this many cores and GPUs that fit the cluster at once, beside `taken` (cores, GPUs); may be 0."""
    there = ((cores(), taken[0], each_cpus), (_gpus(), taken[1], each_gpus))
    shares = [int(max(0.0, have - others) / need) for have, others, need in there if need]
    return min(shares, default=cores())


def fit(each_cpus: float, each_gpus: float, taken: tuple[float, float] = (0, 0)) -> int:
    """`room`; raises UserError where it is 0: Ray would wait for ever."""
    count = room(each_cpus, each_gpus, taken)
    if count < 1:
        raise UserError(
            f"a process of {each_cpus:g} core(s) and {each_gpus:g} GPU(s) does not fit a cluster of "
            f"{counted(cores(), 'core')} and {counted(_gpus(), 'GPU')}: set fleet.cpus or fleet.gpus lower."
        )
    return count


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _attach(address: str) -> None:
    import ray

    if "://" in address and not address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS={address} is a dashboard's address, not a cluster's: submit with `ray job submit --address "
            f"{address}`, or set RAY_ADDRESS to the cluster's host:6379."
        )
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdigit():
            socket.create_connection((host, int(port)), PROBE_SECONDS).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise UserError(
            f"RAY_ADDRESS={address} leads to no Ray cluster ({reason}): start one with `ray start --head`, or unset "
            "RAY_ADDRESS to run on this machine."
        ) from error


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watch(servers: list[psutil.Process], over: threading.Event) -> None:
    """Once a server has died, stop this process by SIGTERM; where that does not, kill it and Ray's processes."""
    names = {process.pid: process.name() for process in servers}
    while not over.wait(LOOK_SECONDS):
        dead = next((process for process in servers if not _lives(process)), None)
        if dead is None:
            continue
        say(
            f"error: Ray's {names[dead.pid]} (process {dead.pid}) has died, killed or out of memory: this stops here; "
            "go on with --resume once there is room."
        )
        os.kill(os.getpid(), signal.SIGTERM)
        if not over.wait(GRACE_SECONDS):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            os._exit(1)
        return
