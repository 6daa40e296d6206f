"""The dispatcher serves a fleet from its own thread: no worker waits for another or for the learner.

    workers ──replies──► ready ──► one batched inference ──► orders ──► workers
                           │ episode ended
                           ▼
                         ended ──► SimicEnvRunner.sample() ──► PPO's learner ──► new weights, between two batches

Rules, each tested:
1. All ready replies are answered in one batch; nothing is polled.
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

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import takewhile

import numpy as np
import torch
from pydantic import Field
from ray.exceptions import RayTaskError
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from esper.platform.console import say
from esper.platform.contracts import Instance, Reply
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.seeding import derive, stream
from esper.platform.telemetry import Candidate, TelemetrySpace
from esper.policies.simic.episode import Choice, InFlight
from esper.policies.simic.fleet import Fleet, Joined, process_lost, sentence
from esper.policies.simic.journal import EpisodeJournal
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import batch, draw
from esper.policies.simic.worker_table import Deadlines, WorkerTable, WorkerView

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
GIVE_UP = 6  # times as many losses as workers, with nothing between them; pauses give a fleet half a minute
OVERTAKING = 2  # episodes a worker that may end before one that began before them


class Progress(Frozen):
    """Where a training stands, beside its journal."""

    learned: int = Field(default=0, ge=0)  # episodes learned from or given up: all with lower numbers
    dropped: tuple[int, ...] = ()  # numbers of the episodes that were given up
    counts: dict[str, int] = Field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    spent: dict[str, dict[str, float]] = Field(default_factory=lambda: {"learned": {}, "dropped": {}})  # of each axis


class Dispatcher:
    """Serves the workers of `fleet`, by the rules of the module."""

    def __init__(
        self,
        fleet: Fleet,
        net: ControllerNet,  # its own: the learner trains another meanwhile
        space: TelemetrySpace,
        *,
        seed: int,
        ahead: int,  # ready decisions at which workers rest
        start: Progress | None = None,  # of a resumed training
        instances: Callable[[int], Instance | None] | None = None,  # of an episode's number
        deadlines: Deadlines | None = None,
        journal: EpisodeJournal | None = None,  # its episodes are resumed
    ) -> None:
        self._fleet, self._net, self._space = fleet, net.double().eval(), space
        self._seed, self._ahead, self._wanted = seed, ahead, 0
        self._instances = instances or (lambda number: None)
        self._weights_seq_no = 0
        self._losses = 0  # of orders, since the last good reply
        self._drops = 0  # of episodes, since the last that ended
        self._journal = journal
        self._changed = threading.Condition()  # held for all that follows, which the learner's thread reads too
        self._table = WorkerTable(deadlines or Deadlines())
        self._orphaned: deque[InFlight] = deque()  # episodes without a worker
        self._untaken: dict[int, InFlight] = {}  # that have begun, by number, in order
        self._longest = 0  # decisions of an episode
        self._new_weights: tuple[Mapping[str, torch.Tensor], int] | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._taken: list[int] = []  # numbers of the episodes whose journal is still there
        self._thread: threading.Thread | None = None
        start = start or Progress()
        self.begun = start.learned  # how many episodes
        self.counts: Counter[str] = Counter(start.counts)
        self.dropped = list(start.dropped)  # numbers of the episodes given up
        self._spent = {fate: dict(used) for fate, used in start.spent.items()}
        if journal is not None:
            self._take_up(journal)

    def collect(self, decisions: int, check: Callable[[], None] | None = None) -> list[SingleAgentEpisode]:
        """Whole episodes of at least so many decisions, in the order of beginning.

        `check` runs a few times a second. Passes on its errors, the thread's, and a UserError where workers only fail.
        """
        if not self._fleet.lockstep and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="simic-dispatcher", daemon=True)
            self._thread.start()
        self._wanted = decisions
        self._fleet.wake()
        while True:
            if check is not None:
                check()
            with self._changed:
                if self._error is not None:
                    raise self._error
                if self.ready() >= decisions:
                    break
                if not self._fleet.lockstep:
                    self._changed.wait(0.25)
                    continue
            self._turn()
        with self._changed:
            taken: list[SingleAgentEpisode] = []
            while sum(map(len, taken)) < decisions:
                number = next(iter(self._untaken))
                episode = self._untaken.pop(number)
                self._taken.append(number)
                taken.append(episode.whole())
                _add(self._spent["learned"], episode.used)
            self._wanted = 0
        self._fleet.wake()
        return taken

    def set_weights(self, weights: Mapping[str, torch.Tensor], weights_seq_no: int) -> None:
        """Choose by these weights from the next batch on."""
        with self._changed:
            self._new_weights = (weights, weights_seq_no)

    def busy_fraction(self) -> float | None:
        """Mean fraction of the time since the last call in which a worker had an order; None in lockstep."""
        with self._changed:
            return None if self._fleet.lockstep else self._table.busy_fraction()

    def progress(self) -> Progress:
        """Where the training stands, if all taken episodes have been learned from."""
        with self._changed:
            learned = next(iter(self._untaken), self.begun)
            spent = {fate: dict(used) for fate, used in self._spent.items()}
            return Progress(learned=learned, dropped=tuple(self.dropped), counts=dict(self.counts), spent=spent)

    def spent(self) -> dict[str, dict[str, float]]:
        """Used amount of each ledger axis, of the episodes `learned` from (or taken), `in_flight` and `dropped`."""
        with self._changed:
            in_flight: dict[str, float] = {}
            for episode in self._untaken.values():
                _add(in_flight, episode.used)
            return {**{fate: dict(used) for fate, used in self._spent.items()}, "in_flight": in_flight}

    def forget(self) -> None:
        """Delete the taken episodes' journals: a whole checkpoint has learned from them."""
        if self._journal is not None:
            self._journal.remove(self._taken)
        self._taken = []

    def instance(self, number: int) -> Instance | None:
        """The instance of an episode."""
        return self._instances(number)

    def in_flight(self) -> list[int]:
        """Numbers of the episodes begun and not taken, ascending."""
        with self._changed:
            return list(self._untaken)

    def ready(self) -> int:
        """Decisions of ended episodes before which none is under way."""
        with self._changed:
            return sum(each.decisions for each in takewhile(lambda each: each.ended, self._untaken.values()))

    def waiting(self) -> int:
        """Decisions of ended episodes that wait for an earlier one."""
        with self._changed:
            return sum(each.decisions for each in self._untaken.values() if each.ended) - self.ready()

    def workers(self) -> list[WorkerView]:
        """A line per worker, for the live view; from any thread."""
        with self._changed:
            return self._table.views(self._fleet.starting())

    def stop(self) -> None:
        """End the thread and the workers; a journal keeps the episodes under way."""
        self._stopped = True
        self._fleet.wake()
        if self._thread is not None:
            self._thread.join()
        self._fleet.close()

    def _serve(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        except BaseException as error:  # surfaces in collect()
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _turn(self) -> None:
        with self._changed:
            self._give_out()
            timeout = self._table.next_deadline()
        events = self._fleet.ready(timeout)
        with self._changed:
            wanting: dict[int, tuple[Candidate, ...]] = {}
            for worker, event in events:
                if isinstance(event, Joined):
                    self._table.join(worker)
                elif isinstance(event, Exception):
                    self._fail(worker, event)
                elif (reply := self._receive(worker, event)) is not None:
                    wanting[worker] = reply.telemetry.actions
            for worker, seconds in self._table.late():
                self._lose(worker, TimeoutError(f"no answer in {seconds:,.0f} s"), "late")
            if wanting:
                self._decide(wanting)

    def _give_out(self) -> None:
        for worker in self._table.free():
            if self._orphaned:
                self._send(worker, self._orphaned.popleft())
            elif self._resting():
                return
            else:
                self._send(worker, self._begin(self.begun))

    def _resting(self) -> bool:
        most = max(self._ahead, self._wanted)  # rule 8
        overtaking = OVERTAKING * self._table.most * self._longest
        return self.ready() >= most or self.ready() + self.waiting() >= most + overtaking

    def _begin(self, number: int) -> InFlight:
        episode = InFlight(number, derive(self._seed, "episode", number), self._instances(number))
        self.begun = max(self.begun, number + 1)
        self._untaken[number] = episode
        if self._journal is not None:
            self._journal.begin(episode)
        return episode

    def _send(self, worker: int, episode: InFlight) -> None:
        self._table.assign(worker, episode)
        self._fleet.submit(worker, episode.order)

    def _receive(self, worker: int, answer: object) -> Reply | None:
        """Book a reply; returns it if it wants an action."""
        episode = self._table.episode(worker)
        if episode is None:
            return None
        try:
            reply = episode.checked(answer, self._space)
        except ValueError as error:
            self._lose(worker, ValueError(f"its reply was refused: {error}"), "refused")
            return None
        self._losses = 0
        self.counts["redone"] += reply.redone
        if reply.unsaved is not None:
            if not self.counts["unsaved"]:  # said once, for all workers
                say(reply.unsaved)
            self.counts["unsaved"] += 1
        self._table.answered(worker, reply)
        episode.take(reply)
        if not episode.ended:
            return reply
        if self._journal is not None:
            self._journal.note(episode)
        self._table.release(worker)
        self._longest = max(self._longest, episode.decisions)
        self._drops = 0
        self._changed.notify_all()
        return None

    def _decide(self, wanting: Mapping[int, tuple[Candidate, ...]]) -> None:
        if self._new_weights is not None:
            weights, self._weights_seq_no = self._new_weights
            self._net.load_state_dict(weights)
            self._new_weights = None
        episodes = {worker: self._table.episode(worker) for worker in wanting}
        under_way = [(worker, episode) for worker, episode in episodes.items() if episode is not None]
        logits, log_p, values = infer(self._net, [episode.observation for _, episode in under_way])
        for row, (worker, episode) in enumerate(under_way):
            uniform = stream(self._seed, "policy", episode.number, len(episode.actions)).random()
            action = draw(logits[row], episode.observation["mask"], uniform)
            doing = str(wanting[worker][action])
            chosen = float(log_p[row, action])
            episode.choose(Choice(action, logits[row], chosen, float(values[row]), self._weights_seq_no, doing))
            if self._journal is not None:
                self._journal.note(episode)
            self._send(worker, episode)

    def _fail(self, worker: int, error: Exception) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError):
            self.counts["failures"] += 1
            raise cause
        self._lose(worker, error, "failures")

    def _lose(self, worker: int, error: Exception, count: str) -> None:
        self.counts[count] += 1
        self._losses += 1
        episode = self._table.leave(worker)
        self._fleet.replace(worker)
        enough = max(GIVE_UP * max(self._table.most, self._fleet.starting()), DEATHS + 1)
        if self._losses >= enough:
            raise _given_up(f"{self._losses} orders in a row were lost", error)
        if episode is None:
            say(f"worker {worker} is gone: {sentence(error)}")
            return
        kind, most = ("deaths", DEATHS) if process_lost(error) or count == "late" else ("tries", TRIES)
        episode.lost[kind] += 1
        where = f"episode {episode.number}, decision {len(episode.actions)}"
        if episode.lost[kind] < most:
            say(f"worker {worker} lost {where} ({sentence(error)}): another takes it up")
            self._orphaned.append(episode)
            return
        say(f"{where} was lost {episode.lost[kind]} times ({sentence(error)}): the episode is given up")
        self.counts["dropped"] += 1
        self.dropped.append(episode.number)
        del self._untaken[episode.number]
        _add(self._spent["dropped"], episode.used)
        self._drops += 1
        if self._journal is not None:
            self._journal.remove([episode.number])
        if self._drops >= enough:
            raise _given_up(f"{self._drops} episodes in a row were lost and none was finished", error)

    def _take_up(self, journal: EpisodeJournal) -> None:
        learned, there = self.begun, journal.numbers()
        journal.remove([number for number in there if number < learned or number in self.dropped])
        for number in range(learned, max([learned, *(number + 1 for number in (*there, *self.dropped))])):
            if number in self.dropped:
                continue
            episode = journal.read(number)
            episode = self._untaken[number] = self._begin(number) if episode is None else episode
            if episode.ended:
                self._longest = max(self._longest, episode.decisions)
            else:
                self._orphaned.append(episode)
        self.begun = max([learned, *(number + 1 for number in (*self._untaken, *self.dropped))])


def infer(net: ControllerNet, observations: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, log-probabilities (B, A), values (B,), float32, of a float64 network: no batch changes the rounding."""
    with torch.no_grad():
        logits, values = net({name: array.double() for name, array in batch(observations).items()})
        outputs = (logits, logits.log_softmax(dim=-1), values)
    logits, log_p, values = (output.float().numpy() for output in outputs)
    return logits, log_p, values


def _add(total: dict[str, float], used: Mapping[str, float]) -> None:
    for axis, amount in used.items():
        total[axis] = total.get(axis, 0.0) + amount


def _given_up(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what}; the last one by {sentence(error).rstrip('.')}: mend that, and try one run with `esper train`."
    )
