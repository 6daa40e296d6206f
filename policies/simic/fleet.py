"""The fleet: workers that come and go, in Ray actors or here; episodes are the dispatcher's business.

No two workers ever have the same number. A worker's first event says that it has started (whatever it holds), each
later one is the answer to its order; an exception says what became of an order, or of its process and so the worker.
"""

import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from esper.platform import cluster
from esper.platform.contracts import Order, Worker

LOOK = 5.0  # seconds between two looks at how many workers there should be
PATIENCE = 900.0  # seconds that a worker has to start
PAUSE = 5.0  # seconds before the next start once a worker could not start: such a fleet must not start hundreds

Events = list[tuple[int, object]]  # (worker, what came of it)


class RayFleet:
    """Ray actors with `up()`, which returns once the actor is there, and `advance(order) -> Reply`.

    `make_worker` starts an actor with `max_restarts=0`; `wanted` is asked every few seconds. Once one is there, as many
    start at once as there are cores: more would wait for each other's imports.
    """

    lockstep = False

    def __init__(self, make_worker: Callable[[], Any], wanted: Callable[[], int]) -> None:
        self._make_worker, self._wanted = make_worker, wanted
        self._events: SimpleQueue[tuple[int, Future[Any] | None]] = SimpleQueue()
        self._actors: dict[int, Any] = {}
        self._starting: dict[int, float] = {}  # worker → since when
        self._started = self._joined = 0
        self._look_at = 0.0
        self._look()

    def submit(self, worker: int, order: Order) -> None:
        """Send an order to a worker that has none. Never raises on the worker's account."""
        self._call(worker, self._actors[worker].advance.remote(order))

    def ready(self, timeout: float) -> Events:
        """All events, waiting up to `timeout` seconds for the first."""
        if time.monotonic() >= self._look_at:
            self._look()
        try:
            arrived = [self._events.get(timeout=max(0.0, min(timeout, self._look_at - time.monotonic())))]
            while not self._events.empty():
                arrived.append(self._events.get_nowait())
        except Empty:
            return []
        # One by one: an event may take the next one's worker away.
        return [
            (worker, self._event(worker, future))
            for worker, future in arrived
            if future is not None and worker in self._actors  # of one that was replaced: too late
        ]

    def replace(self, worker: int) -> None:
        """Kill the actor; `ready` starts another if one is wanted. An unknown number is ignored."""
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)
            self._look_at = 0.0

    def starting(self) -> int:
        return len(self._starting)

    def wake(self) -> None:
        """Make `ready`, in another thread, return now."""
        self._events.put((-1, None))

    def close(self) -> None:
        while self._actors:
            ray.kill(self._actors.popitem()[1])

    def _look(self) -> None:
        """Start wanted actors; end those that wait in vain for a lost node."""
        now = time.monotonic()
        self._look_at, wanted = now + LOOK, self._wanted()
        stuck = [worker for worker, since in self._starting.items() if now - since > PATIENCE]
        for worker in stuck or sorted(self._starting, reverse=True)[: max(0, len(self._actors) - wanted)]:
            del self._starting[worker]
            ray.kill(self._actors.pop(worker))
        at_once = max(1, cluster.cores()) if self._joined else 1
        while len(self._actors) < wanted and len(self._starting) < at_once:
            worker, self._started = self._started, self._started + 1
            self._actors[worker] = self._make_worker()
            self._starting[worker] = now
            self._call(worker, self._actors[worker].up.remote())

    def _call(self, worker: int, reference: ray.ObjectRef) -> None:
        reference.future().add_done_callback(lambda future: self._events.put((worker, future)))

    def _event(self, worker: int, future: "Future[Any]") -> object:
        error = future.exception()
        starting = self._starting.pop(worker, None) is not None
        if not isinstance(error, Exception):
            if starting:
                self._joined += 1
                self._look()
            return future.result()
        if process_lost(error):
            ray.kill(self._actors.pop(worker))  # it may be unreachable, not dead
            if starting:
                self._look_at = time.monotonic() + PAUSE
            else:
                self._look()
        return error


class LocalFleet:
    """`n` workers in the caller's thread, in lockstep, for surrogates: an order is done when `submit` returns."""

    lockstep = True

    def __init__(self, make_worker: Callable[[], Worker], n: int) -> None:
        self._workers = {worker: make_worker() for worker in range(n)}
        self._make_worker, self._started = make_worker, n
        self._events: Events = [(worker, None) for worker in self._workers]

    def submit(self, worker: int, order: Order) -> None:
        try:
            event = self._workers[worker].advance(order)
        except Exception as error:
            event = error
        self._events.append((worker, event))

    def ready(self, timeout: float) -> Events:
        events, self._events = self._events, []
        return events

    def replace(self, worker: int) -> None:
        if self._workers.pop(worker, None) is not None:
            self._workers[self._started] = self._make_worker()
            self._events.append((self._started, None))
            self._started += 1

    def starting(self) -> int:
        return 0

    def wake(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self._workers.clear()


Fleet = RayFleet | LocalFleet


def process_lost(error: Exception) -> bool:
    """Whether the worker's process is gone; otherwise its run only raised."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def sentence(error: Exception) -> str:
    """A worker's error in one line: its own error or its process's cause of death."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RayError):
        text = re.sub(r"\x1b\[\d+m", "", str(error))
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
        return last.split(" Worker exit type:")[0]  # what follows guesses at causes, at length
    return f"{type(error).__name__}: {error}"
