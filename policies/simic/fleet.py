"""The fleet: N logical workers that an answer can be asked of, in other processes or in this one.

A logical worker outlives what serves it: when its actor is gone for good, another takes its number.
"""

import re
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayError, RayTaskError

from esper.platform.contracts import Run, Transition
from esper.platform.telemetry import Telemetry

Method = Literal["reset", "step"]
Answer = Telemetry | Transition | Exception


class Fleet(Protocol):
    """What the dispatcher asks of workers.

    Attributes:
        size: logical workers, numbered from 0.
        lockstep: whether calls run in the caller's thread. Then the dispatcher is pumped by the learner's thread,
            between updates, and a training is a function of its seed.
    """

    size: int
    lockstep: bool

    def submit(self, worker: int, method: Method, *args: Any) -> None:
        """Call `method` of a worker that has no call in flight. Never raises for the worker's sake."""
        ...

    def ready(self, timeout: float) -> list[tuple[int, Answer]]:
        """Every answer there is, waiting up to `timeout` seconds for the first; an error is an answer."""
        ...

    def replace(self, worker: int, error: Exception) -> None:
        """Make a worker that failed with `error` fit for a reset."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class RayFleet:
    """Ray actors with the methods `reset(instance, seed) -> Telemetry` and `step(action) -> Transition`.

    Args:
        make_worker: makes the actor of a number, with `max_restarts=-1`, so that Ray restarts one whose process dies.
        n: workers.
    """

    lockstep = False

    def __init__(self, make_worker: Callable[[int], ActorHandle], n: int) -> None:
        self.size = n
        self._make_worker = make_worker
        self._actors = [make_worker(i) for i in range(n)]
        self._calls: dict[ray.ObjectRef, int] = {}

    def submit(self, worker: int, method: Method, *args: Any) -> None:
        """Send the call."""
        self._calls[getattr(self._actors[worker], method).remote(*args)] = worker

    def ready(self, timeout: float) -> list[tuple[int, Answer]]:
        """Block for one answer, then take all that have come."""
        if not self._calls:
            time.sleep(timeout)
            return []
        calls = list(self._calls)
        done, _ = ray.wait(calls, num_returns=1, timeout=timeout)
        if done:
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return [(self._calls.pop(call), _answer(call)) for call in done]

    def replace(self, worker: int, error: Exception) -> None:
        """Another actor if this one is gone for good; else Ray restarts it, or its run merely raised."""
        if isinstance(error, ActorDiedError | ActorUnschedulableError):
            self._actors[worker] = self._make_worker(worker)

    def close(self) -> None:
        """Kill the actors: what they were doing is of no use to anyone now."""
        self._calls.clear()
        for actor in self._actors:
            ray.kill(actor)


class LocalFleet:
    """Runs in this process: a call is done when `submit` returns. For SurrogateRun, microseconds a decision.

    Args:
        make_run: makes a run.
        n: workers.
    """

    lockstep = True

    def __init__(self, make_run: Callable[[], Run], n: int) -> None:
        self.size = n
        self._make_run = make_run
        self._runs = [make_run() for _ in range(n)]
        self._answers: list[tuple[int, Answer]] = []

    def submit(self, worker: int, method: Method, *args: Any) -> None:
        """Do the call and keep its answer."""
        try:
            answer = getattr(self._runs[worker], method)(*args)
        except Exception as error:
            answer = error
        self._answers.append((worker, answer))

    def ready(self, timeout: float) -> list[tuple[int, Answer]]:
        """The answers, in the order of the calls."""
        answers, self._answers = self._answers, []
        return answers

    def replace(self, worker: int, error: Exception) -> None:
        """Another run."""
        self._runs[worker] = self._make_run()

    def close(self) -> None:
        """Drop the runs."""
        self._runs.clear()


def process_lost(error: Exception) -> bool:
    """Whether a worker's process is gone (and its successor needs seconds to start), or its run merely raised."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def sentence(error: Exception) -> str:
    """What a worker's error says: its last line, which in Ray's is the worker's own error or the cause of death."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RayError):
        text = re.sub(r"\x1b\[\d+m", "", str(error))
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {error}"


def _answer(call: ray.ObjectRef) -> Answer:
    try:
        return ray.get(call)
    except Exception as error:
        return error
