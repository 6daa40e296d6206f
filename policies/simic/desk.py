"""Desk: which worker does which order, since when, and by when it must have answered."""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from esper.platform.contracts import Reply
from esper.policies.simic.flight import Flight
from esper.policies.simic.view import WorkerView

LOOK = 1.0  # seconds after which the loop looks about though nothing has come
KNOWN = 64  # latest replies that tell how much longer than expected a decision takes


@dataclass(frozen=True)
class Deadlines:
    """How long an order may take: (grace + factor · ratio · expected) · 2^(times it was lost with a process already).

    `expected` is what the run's clock predicts, for all of an order's decisions where a new worker may have to do them
    again; `ratio`, at least 1, the median of worked over expected seconds in this fleet: clocks are fitted to another
    machine, and cores are shared. Before an episode's first observation nothing is expected, and the grace is all.

    Attributes:
        factor: times the usual.
        grace: seconds, to start a process, open data and read a save.
    """

    factor: float = 20.0
    grace: float = 300.0


@dataclass
class Seat:
    """A worker that is there.

    Attributes:
        flight: whose order it has, or whose it has just answered; none while it rests.
        working: whether it has not answered yet.
        since: when the order was sent.
        booked: until when its time has been counted.
        deadline: by when it must have answered.
        seconds: that its last answer took.
    """

    flight: Flight | None = None
    working: bool = False
    since: float = 0.0
    booked: float = field(default_factory=time.monotonic)
    deadline: float = math.inf
    seconds: float | None = None


class Desk:
    """The seats, by worker. Not thread-safe: the dispatcher holds its lock."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._seats: dict[int, Seat] = {}
        self._ratios: deque[float] = deque(maxlen=KNOWN)
        self._most = 1  # workers there have been at once
        self._busy = self._there = 0.0  # worker-seconds with an order, and in all, since `busy_fraction`

    def size(self) -> int:
        """The most workers that were there at once."""
        return self._most

    def join(self, worker: int) -> None:
        """A worker is there."""
        self._seats[worker] = Seat()
        self._most = max(self._most, len(self._seats))

    def leave(self, worker: int) -> Flight | None:
        """A worker is gone; the flight that it had."""
        seat = self._seats.pop(worker, None)
        if seat is None:
            return None
        self._book(seat)
        return seat.flight

    def free(self) -> list[int]:
        """Workers without an order."""
        return [worker for worker, seat in self._seats.items() if seat.flight is None]

    def flight(self, worker: int) -> Flight | None:
        """Whose order a worker has."""
        seat = self._seats.get(worker)
        return seat.flight if seat is not None else None

    def flights(self) -> list[Flight]:
        """Every flight that a worker has."""
        return [seat.flight for seat in self._seats.values() if seat.flight is not None]

    def assign(self, worker: int, flight: Flight) -> None:
        """A worker gets a flight's next order."""
        seat = self._seats[worker]
        self._book(seat)
        again = len(flight.actions) if seat.flight is not flight else 1
        seat.flight, seat.working, seat.since = flight, True, time.monotonic()
        ratio = max(1.0, median(self._ratios)) if self._ratios else 1.0
        usual = self._deadlines.factor * ratio * flight.expected * max(1, again)
        late = 2 ** flight.missed.get("deaths", 0)
        seat.deadline = seat.since + (self._deadlines.grace + usual) * late

    def answered(self, worker: int, reply: Reply) -> None:
        """A worker has answered; it keeps its flight until it is released or has another order."""
        seat = self._seats[worker]
        self._book(seat)
        flight = seat.flight
        seat.working, seat.deadline, seat.seconds = False, math.inf, reply.worked
        if flight is not None and flight.actions and not reply.redone and flight.expected > 0:
            self._ratios.append(reply.worked / flight.expected)

    def release(self, worker: int) -> None:
        """A worker's episode has ended."""
        seat = self._seats[worker]
        self._book(seat)
        seat.flight = None

    def late(self) -> list[tuple[int, float]]:
        """Workers past their deadline, with the seconds they have had."""
        now = time.monotonic()
        return [(worker, now - seat.since) for worker, seat in self._seats.items() if now > seat.deadline]

    def next_deadline(self) -> float:
        """Seconds until the loop has to look about: at the next deadline, and every second."""
        nearest = min((seat.deadline for seat in self._seats.values()), default=math.inf)
        return max(0.0, min(LOOK, nearest - time.monotonic()))

    def busy_fraction(self) -> float:
        """Mean fraction of the time since the last call in which a worker that is there had an order."""
        for seat in self._seats.values():
            self._book(seat)
        fraction = self._busy / self._there if self._there > 0 else 0.0
        self._busy = self._there = 0.0
        return min(1.0, fraction)

    def views(self, starting: int) -> list[WorkerView]:
        """A line a worker."""
        lines = [_view(worker, seat) for worker, seat in sorted(self._seats.items())]

        return [*lines, *(WorkerView(worker=-1, state="starting") for _ in range(starting))]

    def _book(self, seat: Seat) -> None:
        now = time.monotonic()
        spent, seat.booked = now - seat.booked, now
        self._there += spent
        if seat.working:
            self._busy += spent


def _view(worker: int, seat: Seat) -> WorkerView:
    flight = seat.flight
    reached = flight.reached if flight is not None else {}
    return WorkerView(
        worker=worker,
        state="resting" if flight is None else "training",
        episode=flight.number if flight is not None else None,
        decision=len(flight.actions) if flight is not None else None,
        budget_used=reached.get("budget_fraction"),
        loss=reached.get("val_loss"),
        parameters=reached.get("parameters"),
        action=flight.doing if flight is not None else None,
        seconds=seat.seconds,
    )
