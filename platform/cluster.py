"""The Ray cluster a pipeline runs on: attached to where `RAY_ADDRESS` says so, else started here, quietly.

`ray job submit` sets `RAY_ADDRESS` for the job's driver, so the same command runs on a laptop and on a cluster. Ray
itself is imported when it is first needed: it takes a second, and `--help` needs none.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from esper.platform.console import say
from esper.platform.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers, and no notice about it
    "RAY_enable_metrics_collection": "0",  # nobody scrapes a laptop's Prometheus metrics, and failing exports are loud
}
VITAL = ("gcs_server", "raylet")  # Ray's processes that a local cluster cannot do without
PROBE_SECONDS = 5  # an address that nothing listens on is found out by this; Ray itself goes on trying for minutes

_vital: dict[str, psutil.Process] = {}  # of the cluster that this process has started


def connect(cpus: int | None = None, gpus: int | None = None, *, worker_logs: bool = False) -> None:
    """Attach to the cluster of `RAY_ADDRESS`, or start one on this machine, and say which in one line.

    In a process that is connected already, only `gpus` is checked. Workers import what the driver can: they get its
    `sys.path`.

    Args:
        cpus: Cores of a cluster that is started here (None: this machine's). An attached cluster has what it has.
        gpus: GPUs the caller is going to use: 0 hides those of a local cluster, None takes what is there.
        worker_logs: Repeat here what workers print. Else it is in Ray's own log folder (/tmp/ray/session_latest/logs)
            only; exceptions of tasks and actors reach their caller in either case.

    Raises:
        UserError: `RAY_ADDRESS` leads to no cluster, or the cluster has fewer GPUs than asked for.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not attached():
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        if attached():
            _attach(address, worker_logs)
        else:
            ray.init(
                address="local",  # never a cluster that happens to be recorded in /tmp/ray
                num_cpus=cpus,
                num_gpus=0 if gpus == 0 else None,  # a number would be believed; None counts the devices
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=worker_logs,
            )
            _vital.update({child.name(): child for child in psutil.Process().children() if child.name() in VITAL})
        _quiet_deaths()
        found = int(ray.cluster_resources().get("GPU", 0))
        where = f"attached to {ray.get_runtime_context().gcs_address}" if attached() else "local cluster"
        say(f"Ray: {where}, {_count(cores(), 'core')}" + (f", {_count(found, 'GPU')}" if found else ""))
    found = int(ray.cluster_resources().get("GPU", 0))
    if gpus is not None and gpus > found:
        raise UserError(
            f"{_count(gpus, 'GPU')} asked for, but the Ray cluster has {found}: choose a CPU preset, or run on a "
            "cluster with enough of them (RAY_ADDRESS)."
        )


@contextmanager
def session(cpus: int | None = None, gpus: int | None = None, *, worker_logs: bool = False) -> Iterator[None]:
    """`connect` for the length of a block, leaving things as they were found.

    At its end a cluster that was started here is shut down and an attached one is only left; a connection that existed
    before the block stays.
    """
    import ray

    existed = ray.is_initialized()
    try:
        connect(cpus, gpus, worker_logs=worker_logs)
        yield
    finally:
        if not existed:
            ray.shutdown()
            _vital.clear()


def check() -> None:
    """To be called often while a cluster is worked on: Ray itself says nothing, or ends this process after a minute.

    Raises:
        UserError: a process is gone that a cluster which was started here cannot do without.
    """
    for name, process in _vital.items():
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise UserError(f"Ray's process {name} has died, as it does where memory runs out: go on with --resume.")


def cores() -> int:
    """Cores of the connected cluster; of this machine (those this process may use) where none is connected."""
    import ray

    if ray.is_initialized():
        return int(ray.cluster_resources().get("CPU", 0))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


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
    there = ((cores(), taken[0], each_cpus), (gpus(), taken[1], each_gpus))
    shares = [int(max(0.0, have - others) / need) for have, others, need in there if need]
    return min(shares, default=cores())


def fit(each_cpus: float, each_gpus: float, taken: tuple[float, float] = (0, 0)) -> int:
    """`room`, which must be at least one.

    Raises:
        UserError: not one; Ray would wait for ever.
    """
    count = room(each_cpus, each_gpus, taken)
    if count < 1:
        raise UserError(
            f"a process of {each_cpus:g} core(s) and {each_gpus:g} GPU(s) does not fit a cluster of "
            f"{_count(cores(), 'core')} and {_count(gpus(), 'GPU')}: set fleet.cpus or fleet.gpus lower."
        )
    return count


def _quiet_deaths() -> None:
    """Leave out Ray's long notice of a worker's death, on standard output: who waited for that worker tells of it."""
    from ray._private import worker

    inner = worker.print_to_stdstream
    if getattr(inner, "quiet", False):
        return

    def but_deaths(data: dict, *args: Any, **keywords: Any) -> None:
        if not any("A worker died or was killed" in line for line in data.get("lines", ())):
            inner(data, *args, **keywords)

    but_deaths.quiet = True  # pyright: ignore[reportFunctionMemberAccess]
    worker.print_to_stdstream = but_deaths


def _attach(address: str, worker_logs: bool) -> None:
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
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=worker_logs)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise UserError(
            f"RAY_ADDRESS={address} leads to no Ray cluster ({reason}): start one with `ray start --head`, or unset "
            "RAY_ADDRESS to run on this machine."
        ) from error


def _count(number: int, noun: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
