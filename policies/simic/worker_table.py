"""The worker table: which worker has which order, since when, and its deadline."""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, get_args

from esper.platform.contracts import Reply
from esper.policies.simic.episode import InFlight

LOOK = 1.0  # seconds after which the loop looks about though nothing has come
KNOWN = 64  # latest replies that tell how much longer than expected a decision takes

State = Literal["starting", "training", "resting"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class WorkerView:
    """A worker at a moment, for displays; None: unknown, or does not apply."""

    worker: int  # from 0; -1 of one that has no number yet
    state: State  # its process starts, it has an episode, it rests between episodes
    episode: int | None = None
    decision: int | None = None  # how many actions of the episode have been chosen
    budget_used: float | None = None  # fraction
    loss: float | None = None  # validation loss at the last decision, nats per token
    parameters: int | None = None
    action: str | None = None  # the last one, in words
    seconds: float | None = None  # that the last decision took


@dataclass(frozen=True)
class Deadlines:
    """How long an order may take: (grace + factor · ratio · expected) · 2^(times it was lost with a process already).

    `expected`: seconds by the run's clock for the decisions to (re)do; `ratio` ≥ 1: the fleet's median worked/expected.
    """

    factor: float = 20.0
    grace: float = 300.0  # seconds, to start a process, open data and read a checkpoint


@dataclass
class _Row:
    episode: InFlight | None = None  # whose order it has, or has just answered; none while it rests
    working: bool = False  # whether it has not answered yet
    since: float = 0.0  # when the order was sent
    booked: float = field(default_factory=time.monotonic)  # until when its time has been counted
    deadline: float = math.inf
    seconds: float | None = None  # that its last answer took


class WorkerTable:
    """A row per worker. Not thread-safe: the dispatcher holds its lock."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._rows: dict[int, _Row] = {}
        self._ratios: deque[float] = deque(maxlen=KNOWN)
        self._busy = self._there = 0.0  # worker-seconds with an order, and in all, since `busy_fraction`
        self.most = 1  # workers that were there at once

    def join(self, worker: int) -> None:
        """Add a worker."""
        self._rows[worker] = _Row()
        self.most = max(self.most, len(self._rows))

    def leave(self, worker: int) -> InFlight | None:
        """Remove a worker; returns its episode."""
        row = self._rows.pop(worker, None)
        if row is None:
            return None
        self._book(row)
        return row.episode

    def free(self) -> list[int]:
        """Workers without an order."""
        return [worker for worker, row in self._rows.items() if row.episode is None]

    def episode(self, worker: int) -> InFlight | None:
        """The episode of a worker's order."""
        row = self._rows.get(worker)
        return row.episode if row is not None else None

    def assign(self, worker: int, episode: InFlight) -> None:
        """Give a worker an episode's next order."""
        row = self._rows[worker]
        self._book(row)
        decisions = 1 if row.episode is episode else max(1, len(episode.actions))
        ratio = max(1.0, median(self._ratios)) if self._ratios else 1.0
        usual = self._deadlines.factor * ratio * episode.expected * decisions
        row.episode, row.working, row.since = episode, True, time.monotonic()
        row.deadline = row.since + (self._deadlines.grace + usual) * 2 ** episode.lost["deaths"]

    def answered(self, worker: int, reply: Reply) -> None:
        """Note an answer; the worker keeps its episode until that ends or another order comes."""
        row = self._rows[worker]
        self._book(row)
        episode = row.episode
        assert episode is not None
        row.working, row.deadline, row.seconds = False, math.inf, reply.worked
        if episode.actions and not reply.redone and episode.expected > 0:
            self._ratios.append(reply.worked / episode.expected)

    def release(self, worker: int) -> None:
        """End a worker's episode."""
        self._rows[worker].episode = None

    def late(self) -> list[tuple[int, float]]:
        """Workers past their deadline, with their seconds so far."""
        now = time.monotonic()
        return [(worker, now - row.since) for worker, row in self._rows.items() if now > row.deadline]

    def next_deadline(self) -> float:
        """Seconds until the next deadline, at most one."""
        nearest = min((row.deadline for row in self._rows.values()), default=math.inf)
        return max(0.0, min(LOOK, nearest - time.monotonic()))

    def busy_fraction(self) -> float:
        """Mean fraction of the time since the last call in which a worker had an order."""
        for row in self._rows.values():
            self._book(row)
        fraction = self._busy / self._there if self._there > 0 else 0.0
        self._busy = self._there = 0.0
        return min(1.0, fraction)

    def views(self, starting: int) -> list[WorkerView]:
        """A line per worker."""
        lines = [_view(worker, row) for worker, row in sorted(self._rows.items())]
        return [*lines, *(WorkerView(-1, "starting") for _ in range(starting))]

    def _book(self, row: _Row) -> None:
        now = time.monotonic()
        spent, row.booked = now - row.booked, now
        self._there += spent
        if row.working:
            self._busy += spent


def _view(worker: int, row: _Row) -> WorkerView:
    episode = row.episode
    if episode is None:
        return WorkerView(worker, "resting", seconds=row.seconds)
    used, loss, parameters = (episode.reached.get(key) for key in ("budget_fraction", "val_loss", "parameters"))
    decision, doing = len(episode.actions), episode.choice.doing if episode.choice is not None else None
    return WorkerView(worker, "training", episode.number, decision, used, loss, parameters, doing, row.seconds)
