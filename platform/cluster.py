"""The Ray cluster a pipeline runs on: attached to where `RAY_ADDRESS` says so, else started here, quietly.

`ray job submit` sets `RAY_ADDRESS` for the job's driver, so the same command runs on a laptop and on a cluster. Ray
itself is imported when it is first needed: it takes a second, and `--help` needs none.

What listens, of a cluster started here: Ray's gcs_server, raylet, agents and monitor, the driver and the workers,
all on 127.0.0.1, and all but the monitor's metrics ask for Ray's token (`~/.ray/auth_token`). Only a program that has
imported Ray before `esper.pipelines` listens beyond this machine.
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
    """Set Ray's environment, unless `RAY_ADDRESS` names a cluster; best before Ray is imported."""
    if not attached():
        for name, value in LOCAL.items():
            os.environ.setdefault(name, value)
        if not os.access(Path.home(), os.W_OK):  # where Ray would put the token that it makes
            os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)


def connect(cpus: int | None = None, gpus: int | None = None) -> None:
    """Attach to the cluster of `RAY_ADDRESS`, or start one on this machine, and say which in one line.

    In a process that is connected already, only `gpus` is checked. Workers import what the driver can: they get its
    `sys.path`. What they print is in Ray's own log folder (/tmp/ray/session_latest/logs).

    Args:
        cpus: cores of a cluster that is started here (None: this machine's). An attached cluster has what it has.
        gpus: GPUs the caller is going to use: 0 hides those of a local cluster, None takes what is there.

    Raises:
        UserError: `RAY_ADDRESS` leads to no cluster, or the cluster has fewer GPUs than asked for.
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
    """`connect` for the length of a block, leaving things as they were found.

    At its end a cluster that was started here is shut down and an attached one is only left; a connection that existed
    before the block stays. Where a server of a cluster that was started here dies, that is said, and the process stops
    as by SIGTERM, or else is ended.
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
    """Cores of the connected cluster; of this machine (those this process may use) where none is connected."""
    import ray

    if ray.is_initialized():
        return int(ray.cluster_resources().get("CPU", 0))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def attached() -> bool:
    """Whether pipelines run on a cluster that `RAY_ADDRESS` names, which may grow; not on one that they start here."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def room(each_cpus: float, each_gpus: float, taken: tuple[float, float] = (0, 0)) -> int:
    """How many processes of this many cores and GPUs the connected cluster holds at once, which may be none.

    Args:
        each_cpus: cores of one.
        each_gpus: GPUs of one.
        taken: cores and GPUs that others are going to need.
    """
    there = ((cores(), taken[0], each_cpus), (_gpus(), taken[1], each_gpus))
    shares = [int(max(0.0, have - others) / need) for have, others, need in there if need]
    return min(shares, default=cores())


def fit(each_cpus: float, each_gpus: float, taken: tuple[float, float] = (0, 0)) -> int:
    """`room`, which must be at least one. Raises UserError: not one; Ray would wait for ever."""
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
    """Connect to a running cluster, saying in one sentence why that cannot be done."""
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
    """Once a server has died, stop this process: by SIGTERM, or, where it does not, at once and with what is Ray's."""
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
