"""The dispatcher: serves a fleet from a thread of its own, so that no worker waits for another or for the learner.

    workers ──replies──► ready ──► one batched inference ──► orders ──► workers
                           │ episode ended
                           ▼
                         queue ──► SimicEnvRunner.sample() ──► PPO's learner ──► new weights, between two batches

Rules, each tested:
1. Whatever is ready is answered in one batch; nothing waits for what is not, and nothing is polled.
2. Whole episodes only, every one that was started, queued in the order in which they end.
3. A step keeps what *chose* its action: logits, log-probability, value and the weights' number (`flight.py`). PPO's
   ratio is then right at any lag.
4. Episode i has the seed `derive(seed, "episode", i)`; the noise of its decision k comes from the stream (seed,
   "policy", i, k), and a row's logits do not depend on its batch: no action depends on who shared it.
5. An episode belongs to no worker. When one dies, hangs past its deadline or leaves with its node, the episode's order
   goes, as it was, to the next free worker, which takes the episode up where it was saved (`workers/worker.py`).
6. What must not be learned from (not finite, of another version or shape, an answer to another order) is refused and
   counted, and the order sent again to another worker. An order that `TRIES` workers failed at, or that took
   `DEATHS` processes with it, gives its episode up: it is counted and listed in `dropped`.
7. When nothing but loss happens, the training ends with the last one's own words; and at once where they are a user's
   to mend.
8. The fleet runs at most `ahead` decisions ahead of the learner: while the queue holds as many, a worker whose episode
   has ended rests before its next; never within an episode.
9. With a journal, all of this outlives this process (`journal.py`).

With a lockstep fleet (LocalFleet) there is no thread: `collect()` itself turns the loop until it has what it was asked
for. No weights arrive meanwhile and the order of answers is fixed, so equal seeds give equal trainings.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping

import torch
from ray.exceptions import RayTaskError
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from esper.platform.console import say
from esper.platform.contracts import Instance, Reply
from esper.platform.errors import UserError
from esper.platform.seeding import derive, stream
from esper.platform.telemetry import Telemetry, TelemetrySpace
from esper.policies.simic.desk import Deadlines, Desk
from esper.policies.simic.fleet import Fleet, Joined, process_lost, sentence
from esper.policies.simic.flight import Choice, Flight
from esper.policies.simic.inference import infer
from esper.policies.simic.journal import Journal
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import draw
from esper.policies.simic.view import WorkerView

TRIES = 3  # workers that may fail at one order, the later ones from the episode's start: it is the order's fault
DEATHS = 10  # processes that may die over one order
GIVE_UP = 6  # times as many losses as workers, with nothing between them; pauses give a fleet half a minute


class Dispatcher:
    """See the module.

    Args:
        fleet: the workers.
        net: a network of its own: the thread reads it while the learner trains another.
        space: what a telemetry must look like.
        seed: of episodes and action noise.
        ahead: decisions that may wait in the queue before workers rest.
        first_episode: number of the first episode, above 0 in a resumed training.
        instances: episode number → instance.
        deadlines: how long orders may take.
        journal: keeps the episodes; what it holds is gone on with.

    Attributes:
        counts: since the start: `failures` (orders lost with their process, or because the run raised, and workers that
            could not start), `late` (orders past their deadline), `refused` (replies), `dropped` (episodes), `redone`
            (decisions trained again), `unsaved` (replies of workers whose last save failed).
        dropped: numbers of the episodes that were given up.
    """

    def __init__(
        self,
        fleet: Fleet,
        net: ControllerNet,
        space: TelemetrySpace,
        *,
        seed: int,
        ahead: int,
        first_episode: int = 0,
        instances: Callable[[int], Instance | None] | None = None,
        deadlines: Deadlines | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._fleet, self._net, self._space = fleet, net.double().eval(), space
        self._seed, self._ahead, self._wanted = seed, ahead, 0
        self._instances = instances or (lambda number: None)
        self._weights_seq_no = 0
        self._losses = 0  # of orders, since the last good reply
        self._drops = 0  # of episodes, since the last that ended
        self._unsaved = False  # said
        self._journal = journal
        # Shared with the learner's thread, under `_changed`.
        self._changed = threading.Condition()
        self._desk = Desk(deadlines or Deadlines())
        self._adrift: deque[Flight] = deque()  # episodes without a worker
        self._queue: deque[SingleAgentEpisode] = deque()
        self._new_weights: tuple[Mapping[str, torch.Tensor], int] | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self.next_episode = first_episode
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("failures", "late", "refused", "dropped", "redone", "unsaved"), 0)
        )
        self.dropped: list[int] = []
        self._thread: threading.Thread | None = None
        if journal is not None:
            self._take_up(journal)

    # -- The learner's side --------------------------------------------------------------------------------------

    def collect(self, decisions: int, check: Callable[[], None] | None = None) -> list[SingleAgentEpisode]:
        """Wait for whole episodes of at least `decisions` decisions and take them, the first ended first.

        Args:
            decisions: at least.
            check: called at once and a few times a second meanwhile; what it raises passes through, nothing is taken.

        Raises:
            UserError: the workers do nothing but fail, or one says what a user can mend.
            Exception: whatever ended the dispatcher's thread.
        """
        if check is not None:
            check()
        if not self._fleet.lockstep and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="simic-dispatcher", daemon=True)
            self._thread.start()
        self._wanted = decisions
        self._fleet.wake()
        while self._fleet.lockstep and self._queued() < decisions:
            if check is not None:
                check()
            self._turn()
        with self._changed:
            while self._queued() < decisions and self._error is None:
                if check is not None:
                    check()
                self._changed.wait(0.25 if check is not None else None)
            if self._error is not None:
                raise self._error
            taken: list[SingleAgentEpisode] = []
            while sum(map(len, taken)) < decisions:
                taken.append(self._queue.popleft())
            self._wanted = 0
        self._fleet.wake()
        return taken

    def set_weights(self, weights: Mapping[str, torch.Tensor], weights_seq_no: int) -> None:
        """Choose by these weights from the next batch on."""
        with self._changed:
            self._new_weights = (weights, weights_seq_no)

    def busy_fraction(self) -> float | None:
        """Mean fraction of the time since the last call in which a worker had an order; none in lockstep."""
        if self._fleet.lockstep:
            return None
        with self._changed:
            return self._desk.busy_fraction()

    def in_flight(self) -> list[int]:
        """Numbers of the episodes that have begun and not ended, and of those that have ended and were not taken."""
        with self._changed:
            flying = [flight.number for flight in (*self._desk.flights(), *self._adrift)]
            return sorted([*flying, *(int(episode.id_) for episode in self._queue)])

    def workers(self) -> list[WorkerView]:
        """A line a worker, for the live view; from any thread."""
        with self._changed:
            return self._desk.views(self._fleet.starting())

    def stop(self) -> None:
        """End the thread and the workers; a journal keeps the episodes under way."""
        with self._changed:
            self._stopped = True
        self._fleet.wake()
        if self._thread is not None:
            self._thread.join()
        self._fleet.close()

    # -- The loop ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        except BaseException as error:  # surfaces in collect()
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _turn(self) -> None:
        """Give out orders, take what is ready, answer it in one batch."""
        self._give_out()
        with self._changed:
            timeout = self._desk.next_deadline()
        waiting: list[tuple[int, Telemetry]] = []
        for worker, event in self._fleet.ready(timeout):
            if isinstance(event, Joined):
                with self._changed:
                    self._desk.join(worker)
            elif isinstance(event, Reply):
                telemetry = self._receive(worker, event)
                if telemetry is not None:
                    waiting.append((worker, telemetry))
            else:
                self._fail(worker, event)
        with self._changed:
            late = self._desk.late()
        for worker, seconds in late:
            self._miss(worker, TimeoutError(f"no answer in {seconds:,.0f} s"), "late")
        if waiting:
            self._swap_weights()
            self._decide(waiting)

    def _give_out(self) -> None:
        """Give every free worker an episode: one that lost its worker, else a new one."""
        for worker in self._desk.free():
            with self._changed:
                if not self._adrift and self._queued() >= max(self._ahead, self._wanted):
                    return
                flight = self._adrift.popleft() if self._adrift else None
                number, self.next_episode = self.next_episode, self.next_episode + (flight is None)
            self._send(worker, flight or self._new_flight(number))

    def _new_flight(self, number: int) -> Flight:
        flight = Flight(number, derive(self._seed, "episode", number), self._instances(number))
        if self._journal is not None:
            self._journal.begin(flight)
        return flight

    def _send(self, worker: int, flight: Flight) -> None:
        with self._changed:
            self._desk.assign(worker, flight)
        self._fleet.submit(worker, flight.order)

    def _receive(self, worker: int, reply: Reply) -> Telemetry | None:
        """Book a reply; the telemetry, if it wants an action."""
        flight = self._desk.flight(worker)
        if flight is None:
            return None
        problem = flight.problem(reply, self._space)
        if problem is not None:
            self._miss(worker, ValueError(f"its reply was refused: {problem}"), "refused")
            return None
        self._losses = 0
        self.counts["redone"] += reply.redone
        self._tell_unsaved(reply.unsaved)
        with self._changed:
            self._desk.answered(worker, reply)
            flight.take(reply)
        assert flight.episode is not None
        if not flight.episode.is_done:
            return reply.telemetry
        if self._journal is not None:
            self._journal.note(flight)
        with self._changed:
            self._desk.release(worker)
            self._queue.append(flight.episode.to_numpy())
            self._drops = 0
            self._changed.notify_all()
        return None

    # -- Losses --------------------------------------------------------------------------------------------------

    def _fail(self, worker: int, error: Exception) -> None:
        """An order, or a worker's start, ended in an exception."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError):
            self.counts["failures"] += 1
            raise cause
        self._miss(worker, error, "failures")

    def _miss(self, worker: int, error: Exception, count: str) -> None:
        """A worker did not do its order: it is replaced, the order is another's; give up if nothing else happens."""
        self.counts[count] += 1
        self._losses += 1
        lost = process_lost(error)
        with self._changed:
            flight = self._desk.leave(worker)
        self._fleet.replace(worker)
        enough = max(GIVE_UP * max(self._desk.size(), self._fleet.starting()), DEATHS + 1)
        if self._losses >= enough:
            raise self._given_up(f"{self._losses} orders in a row were lost", error)
        if flight is None:
            say(f"worker {worker} is gone: {sentence(error)}")
            return
        kind = "deaths" if lost or count == "late" else "tries"
        flight.missed[kind] = flight.missed.get(kind, 0) + 1
        where = f"episode {flight.number}, decision {len(flight.actions)}"
        if flight.missed[kind] < (DEATHS if kind == "deaths" else TRIES):
            say(f"worker {worker} lost {where} ({sentence(error)}): another takes it up")
            with self._changed:
                self._adrift.append(flight)
            return
        say(f"{where} was lost {flight.missed[kind]} times ({sentence(error)}): the episode is given up")
        self.counts["dropped"] += 1
        self.dropped.append(flight.number)
        self._drops += 1
        if self._journal is not None:
            self._journal.remove([flight.number])
        if self._drops >= enough:
            raise self._given_up(f"{self._drops} episodes in a row were lost and none was finished", error)

    @staticmethod
    def _given_up(what: str, error: Exception) -> UserError:
        return UserError(
            f"{what}; the last one by {sentence(error).rstrip('.')}: mend that, and try one run with `esper train`."
        )

    def _tell_unsaved(self, unsaved: str | None) -> None:
        """Say once, for all workers, that saves fail."""
        if unsaved is not None:
            self.counts["unsaved"] += 1
            if not self._unsaved:
                say(unsaved)
            self._unsaved = True

    # -- Choosing ------------------------------------------------------------------------------------------------

    def _decide(self, waiting: list[tuple[int, Telemetry]]) -> None:
        """One inference for all, then the orders."""
        logits, log_p, values = infer(self._net, [telemetry for _, telemetry in waiting])  # (B, A), (B, A), (B,)
        for row, (worker, telemetry) in enumerate(waiting):
            flight = self._desk.flight(worker)
            assert flight is not None
            uniform = stream(self._seed, "policy", flight.number, telemetry.sequence).random()
            index = draw(logits[row], telemetry.mask, uniform)
            chosen = Choice(index, logits[row], float(log_p[row, index]), float(values[row]), self._weights_seq_no)
            with self._changed:
                flight.choose(chosen)
                flight.doing = str(telemetry.actions[index])
            if self._journal is not None:
                self._journal.note(flight)
            self._send(worker, flight)

    def _swap_weights(self) -> None:
        with self._changed:
            new, self._new_weights = self._new_weights, None
        if new is not None:
            self._net.load_state_dict(new[0])
            self._weights_seq_no = new[1]

    # -- Helpers -------------------------------------------------------------------------------------------------

    def _take_up(self, journal: Journal) -> None:
        """Go on with what a journal holds."""
        found = journal.read()
        self._queue.extend(found.ended)
        self.next_episode = max(self.next_episode, found.next_episode)
        self._adrift.extend(found.flights)
        self._adrift.extend(self._new_flight(number) for number in found.blank)

    def _queued(self) -> int:
        """Decisions in the queue."""
        with self._changed:  # re-entrant
            return sum(map(len, self._queue))
