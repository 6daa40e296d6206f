"""The dispatcher serves a fleet from its own thread: no worker waits for another or for the learner.

    workers ──replies──► ready ──► one batched inference ──► orders ──► workers
                           │ episode ended
                           ▼
                         ended ──► PPOTraining.iterate() ──► RLlib's PPO learner ──► new weights, between two batches

Rules, each tested:
1. All ready replies are answered in one batch; nothing is polled. Few of many wait 5 ms for others.
2. Every episode is learned from whole, in the order of beginning: the order of ending would prefer short episodes.
3. A step keeps the logits and the number of the weights that chose its action: PPO's ratio is right at any lag.
4. Episode i has the seed `derive(seed, "episode", i)`, its decision k the stream (seed, "policy", i, k); no action
   depends on its batch.
5. An episode belongs to no worker: a lost order goes, unchanged, to the next free one (`workers/worker.py`).
6. A bad reply is refused, and its order sent again; `TRIES` failed workers or `DEATHS` processes drop the episode.
7. Losses with no good reply between them end the training with the last error; a UserError ends it at once.
8. A worker begins no episode while `ahead` decisions are ready, or while ready and waiting ones exceed that by
   `OVERTAKING` episodes a worker. With W workers, K decisions an episode and batches of B, a decision is learned from
   within 1 + (ahead + (OVERTAKING + 1)·W·K) / B updates.
9. With a journal, the episodes outlive this process (`journal.py`).

A lockstep fleet has no thread: `collect()` turns the loop, and equal seeds give equal trainings.
"""

import gc
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from ray.exceptions import RayTaskError

from esper.platform.console import say
from esper.platform.contracts import Instance, Reply
from esper.platform.errors import UserError
from esper.platform.seeding import derive, stream
from esper.platform.spec import FleetSpec
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.episode import InFlight, Played, arrays
from esper.policies.simic.fleet import Fleet, process_lost, sentence
from esper.policies.simic.journal import EpisodeJournal
from esper.policies.simic.net import ControllerNet

TRIES = 3  # workers that may fail at one order, the later ones from the episode's start: it is the order's fault
DEATHS = 10  # processes that may die over one order
COUNTS = (
    "failures",  # orders lost with their process, or because the run raised, and workers that could not start
    "late",  # orders past their deadline
    "refused",  # replies
    "dropped",  # episodes
    "redone",  # decisions trained again
    "unsaved",  # replies of workers whose last checkpoint was not written
)
GIVE_UP = 6  # times as many losses in a row as workers
OVERTAKING = 2  # episodes a worker that may end before one that began before them
GATHER = 0.005  # seconds in which more replies may come where few of many have: a batch costs little more than one
LOOK = 1.0  # seconds between two looks for late workers
KNOWN = 64  # latest replies that tell how much longer than expected a decision takes


class Progress(BaseModel, extra="forbid"):
    """Where a training stands, beside its journal."""

    learned: int = Field(default=0, ge=0)  # episodes learned from (or taken) or given up: all with lower numbers
    dropped: list[int] = []  # numbers of the episodes that were given up
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    spent: dict[str, dict[str, float]] = {"learned": {}, "dropped": {}}  # of each ledger axis


class Dispatcher:
    """Serves the workers of `fleet`, by the rules of the module."""

    def __init__(
        self,
        fleet: Fleet,
        net: ControllerNet,  # its own: the learner trains another meanwhile
        space: TelemetrySpace,
        *,
        seed: int,
        ahead: int,  # ready decisions at which workers rest; at least those of a batch
        limits: FleetSpec | None = None,  # its `deadline` and `grace`
        start: Progress | None = None,  # of a resumed training
        instances: Callable[[int], Instance | None] | None = None,  # of an episode's number
        journal: Path | None = None,  # folder of the episodes in flight, which are resumed
    ) -> None:
        self._fleet, self._space, self._seed, self._ahead = fleet, space, seed, ahead
        self._net = net.double().eval()  # in float64 no batch changes the rounding
        self._weights_seq_no = 0
        self._limits, self._instances = limits or FleetSpec(), instances or (lambda number: None)
        self.progress = start or Progress()
        self.begun = self.progress.learned  # number of the next episode
        self.ready = self.waiting = 0  # decisions of `_complete`, and of the ended episodes among `_open`
        self._in_a_row = Counter[str]()  # lost `orders` since the last good reply, `episodes` since one ended
        self._longest = 0  # decisions of an episode
        self._complete: deque[InFlight] = deque()  # ended, as has all that began before: to be learned from, in order
        self._open: dict[int, InFlight] = {}  # by number, the first that has not ended, and all that began after it
        self._orphaned: deque[InFlight] = deque()  # without a worker
        self._orders: dict[int, InFlight] = {}  # worker → whose order it has
        self._free: set[int] = set()  # workers without an order
        self._most = 1  # workers that were there at once
        self._ratios: deque[float] = deque(maxlen=KNOWN)  # seconds worked over those expected
        self._busy = self._there = 0.0  # worker-seconds with an order, and in all, since `busy_fraction`
        self._counted = self._looked = time.monotonic()  # until when those are counted, and no worker was late
        self._changed = threading.Condition()  # held for all of the above, which the learner's thread reads too
        self._error: BaseException | None = None
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._journal = None if journal is None else EpisodeJournal(journal, space)
        if self._journal is not None:
            with self._changed:
                self._take_up(self._journal)

    def collect(self, decisions: int, check: Callable[[], None] = lambda: None) -> list[Played]:
        """Whole episodes of at least so many decisions, in the order of beginning.

        `check` runs a few times a second. Passes on its errors, the thread's, and a UserError where workers only fail.
        """
        if not self._fleet.lockstep and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="simic-dispatcher", daemon=True)
            self._thread.start()
        while True:
            check()
            with self._changed:
                if self._error is not None:
                    raise self._error
                if self.ready >= decisions:
                    break
                if self._thread is not None:
                    self._changed.wait(0.25)
            if self._thread is None:
                self._turn()
        taken: list[InFlight] = []
        with self._changed:
            while sum(episode.done for episode in taken) < decisions:
                taken.append(self._complete.popleft())
                self.ready -= taken[-1].done
                _add(self.progress.spent["learned"], taken[-1].used)
            self.progress.learned = next(self._untaken(), self.begun)
        self._fleet.wake()
        return [episode.played(self._space) for episode in taken]  # workers do not wait for that

    def set_weights(self, weights: Mapping[str, torch.Tensor], weights_seq_no: int) -> None:
        with self._changed:
            self._net.load_state_dict(weights)
            self._weights_seq_no = weights_seq_no

    def busy_fraction(self) -> float | None:
        """Mean fraction of the time since the last call in which a worker had an order; None in lockstep."""
        with self._changed:
            self._count_time()
            fraction = min(1.0, self._busy / self._there) if self._there else 0.0
            self._busy = self._there = 0.0
            return None if self._fleet.lockstep else fraction

    def spent(self) -> dict[str, dict[str, float]]:
        """Used amount of each ledger axis, of the episodes `learned` from (or taken), `in_flight` and `dropped`."""
        in_flight: dict[str, float] = {}
        with self._changed:
            for episode in chain(self._complete, self._open.values()):
                _add(in_flight, episode.used)
            return {**self.progress.spent, "in_flight": in_flight}

    def forget(self) -> None:
        """Delete the taken episodes' journals: a whole checkpoint has learned from them."""
        if self._journal is not None:
            with self._changed:
                self._journal.keep_only(self._untaken())

    def in_flight(self) -> list[int]:
        """Numbers of the episodes begun and not taken, ascending."""
        with self._changed:
            return list(self._untaken())

    def workers(self) -> list[dict[str, Any]]:
        """What each worker does, for the live view. Lockless: who draws has the terminal, which `say` here wants."""
        there = sorted({**dict.fromkeys(self._free), **self._orders}.items())
        there = [{"worker": worker} | _doing(episode) for worker, episode in there]
        return there + [{"state": "starting"}] * self._fleet.starting()

    def stop(self) -> None:
        """End the thread and the workers; a journal keeps the episodes under way."""
        self._stopped = True
        self._fleet.wake()
        if self._thread is not None:
            self._thread.join()
            gc.unfreeze()
        self._fleet.close()
        if self._journal is not None:
            self._journal.close()

    def _untaken(self) -> Iterator[int]:
        return chain((episode.number for episode in self._complete), self._open)

    def _serve(self) -> None:
        gc.collect()
        gc.freeze()  # else each full collection walks torch's, Ray's and RLlib's 300,000 objects: 0.2 s for all threads
        try:
            while not self._stopped:
                if self._turn() < len(self._orders) / 10:
                    time.sleep(GATHER)
        except BaseException as error:  # surfaces in collect()
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _turn(self) -> int:
        """Give free workers orders; then book the replies that came, answer those that ask; returns how many came."""
        with self._changed:
            self._count_time()
            while self._free and (self._orphaned or not self._resting()):
                self._send(self._free.pop(), self._orphaned.popleft() if self._orphaned else self._begin())
        events = self._fleet.ready(LOOK)
        with self._changed:
            self._count_time()
            replied: list[tuple[int, InFlight]] = []
            for worker, event in events:
                if isinstance(event, Exception):
                    self._lose(worker, event, "failures")
                elif worker not in self._orders:  # it has started
                    self._free.add(worker)
                    self._most = max(self._most, len(self._free) + len(self._orders))
                else:
                    episode = self._orders[worker]
                    try:
                        reply = episode.take(event, self._space)
                    except ValueError as error:
                        self._lose(worker, ValueError(f"its reply was refused: {error}"), "refused")
                        continue
                    self._book(worker, episode, reply)
                    replied.append((worker, episode))
            asking = [(worker, episode) for worker, episode in replied if not episode.ended]
            if asking:
                self._decide([episode for _, episode in asking])
            if self._journal is not None:
                self._journal.note([episode.decisions[-1] for _, episode in replied])
            for worker, episode in asking:
                self._send(worker, episode)
            if self._counted - self._looked >= LOOK:  # not each turn: it looks at all workers
                self._looked = self._counted
                for worker, episode in list(self._orders.items()):
                    if self._counted > episode.deadline:
                        late = TimeoutError(f"no answer in {self._counted - episode.since:,.0f} s")
                        self._lose(worker, late, "late")
        return len(events)

    def _count_time(self) -> None:
        now = time.monotonic()
        self._there += (now - self._counted) * (len(self._free) + len(self._orders))
        self._busy += (now - self._counted) * len(self._orders)
        self._counted = now

    def _resting(self) -> bool:
        overtaking = OVERTAKING * self._most * self._longest  # rule 8
        return self.ready >= self._ahead or self.ready + self.waiting >= self._ahead + overtaking

    def _begin(self) -> InFlight:
        number, self.begun = self.begun, self.begun + 1
        episode = InFlight(number, derive(self._seed, "episode", number), self._instances(number))
        self._open[number] = episode
        return episode

    def _send(self, worker: int, episode: InFlight) -> None:
        """Send an episode's next order: to take one decision, or for another worker, to redo all.

        Its deadline: (grace + deadline · ratio · expected) · 2^(times it was lost with a process already), `ratio` ≥ 1
        being the fleet's median of seconds worked over those expected.
        """
        decisions = 1 if self._orders.get(worker) is episode else max(1, len(episode.actions))
        expected = episode.decisions[-1].expected if episode.decisions else 0.0
        ratio = max(1.0, median(self._ratios)) if self._ratios else 1.0
        seconds = self._limits.grace + self._limits.deadline * ratio * expected * decisions
        episode.since = time.monotonic()
        episode.deadline = episode.since + seconds * 2 ** episode.lost["deaths"]
        self._orders[worker] = episode
        self._fleet.submit(worker, episode.order)

    def _book(self, worker: int, episode: InFlight, reply: Reply) -> None:
        """Count a good reply; the last of an episode frees its worker."""
        self._in_a_row["orders"] = 0
        self.progress.counts["redone"] += reply.redone
        if reply.unsaved is not None:
            if not self.progress.counts["unsaved"]:  # said once, for all workers
                say(reply.unsaved)
            self.progress.counts["unsaved"] += 1
        expected = episode.decisions[-2].expected if episode.done else 0.0
        if expected > 0 and not reply.redone:
            self._ratios.append(reply.worked / expected)
        if episode.ended:
            del self._orders[worker]
            self._free.add(worker)
            self._in_a_row["episodes"] = 0
            self._settle(episode)

    def _decide(self, asking: list[InFlight]) -> None:
        seen = arrays(np.stack([episode.decisions[-1].observation for episode in asking]), self._space)
        uniform = [stream(self._seed, "policy", each.number, each.done).random() for each in asking]
        chosen = self._net.choose(seen, np.array(uniform))
        for episode, action, logits, log_p, value in zip(asking, *chosen, strict=True):
            said = {"logits": logits, "log_p": float(log_p), "value": float(value), "weights": self._weights_seq_no}
            episode.choose(action=int(action), doing=str(episode.candidates[action]), **said)

    def _lose(self, worker: int, error: Exception, count: str) -> None:
        """Replace a worker; its episode goes to another, or is given up."""
        self.progress.counts[count] += 1
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError):
            raise cause
        self._in_a_row["orders"] += 1
        episode, told = self._orders.pop(worker, None), sentence(error)
        self._free.discard(worker)
        self._fleet.replace(worker)
        if episode is None:
            say(f"worker {worker} is gone: {told}")
        else:
            kind, most = ("deaths", DEATHS) if process_lost(error) or count == "late" else ("tries", TRIES)
            episode.lost[kind] += 1
            where = f"worker {worker} lost episode {episode.number}, decision {len(episode.actions)} ({told})"
            if episode.lost[kind] < most:
                say(f"{where}: another takes it up")
                self._orphaned.append(episode)
            else:
                say(f"{where}, as {most - 1} before it: the episode is given up")
                self.progress.counts["dropped"] += 1
                self.progress.dropped.append(episode.number)
                _add(self.progress.spent["dropped"], episode.used)
                del self._open[episode.number]
                self._settle()
                self._in_a_row["episodes"] += 1
        if max(self._in_a_row.values()) >= max(GIVE_UP * max(self._most, self._fleet.starting()), DEATHS + 1):
            lost = " and ".join(f"{number} {what}" for what, number in self._in_a_row.items() if number)
            what = f"{lost} in a row were lost; the last one by {told.rstrip('.')}"
            raise UserError(f"{what}: mend that, and try one run with `esper train`.")

    def _settle(self, ended: InFlight | None = None) -> None:
        """Count an ended episode; those before which none is under way are complete, and who collects is told."""
        if ended is not None:
            self.waiting += ended.done
            self._longest = max(self._longest, ended.done)
        while (first := next(iter(self._open.values()), None)) is not None and first.ended:
            self._complete.append(self._open.pop(first.number))
            self.ready += first.done
            self.waiting -= first.done
            self._changed.notify_all()

    def _take_up(self, journal: EpisodeJournal) -> None:
        """Go on with the journal's episodes; those between that it lacks begin anew."""
        found, dropped = journal.read(), self.progress.dropped
        last = max([*found, *dropped], default=-1)
        while self.begun <= last:
            if self.begun in dropped:
                self.begun += 1
                continue
            episode = self._begin()
            episode.decisions = found.get(episode.number, [])
            if episode.ended:
                self._settle(episode)
            else:
                self._orphaned.append(episode)
        journal.keep_only(self._untaken())


def _doing(episode: InFlight | None) -> dict[str, Any]:
    if episode is None:
        return {"state": "resting"}  # it has no episode
    row = {"state": "training", "episode": episode.number, "decision": len(episode.actions)}
    if episode.decisions:
        now = episode.decisions[-1]
        row |= {"action": now.doing, "seconds": now.worked, "budget_used": now.reached.get("budget_fraction")}
        row |= {"loss": now.reached.get("val_loss"), "parameters": now.reached.get("parameters")}
    return row


def _add(total: dict[str, float], used: Mapping[str, float]) -> None:
    for axis, amount in used.items():
        total[axis] = total.get(axis, 0.0) + amount
