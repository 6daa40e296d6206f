"""The dispatcher: serves a fleet from a thread of its own, so that no worker waits for another or for the learner.

    workers ──telemetry──► ready ──► one batched inference ──► actions ──► workers
                             │ episode ended
                             ▼
                           queue ──► SimicEnvRunner.sample() ──► PPO's learner ──► new weights, between two batches

Rules, each tested:
1. Whatever is ready is answered in one batch; nothing waits for what is not.
2. Whole episodes only, every one that was started, queued in the order in which they end.
3. A step keeps what *chose* its action: logits, log-probability, value and the weights' number, kept with the request
   until the reply comes, for new weights may have been swapped in by then. PPO's ratio is then right at any lag.
4. Episode i has the seed `derive(seed, "episode", i)`; the noise of its decision k comes from the stream (seed,
   "policy", i, k), so that no action depends on which telemetries shared a batch.
5. A worker that fails loses its episode, and goes on with another, after a pause if its process is gone. A telemetry
   that must not be used is refused and its episode dropped. Both are counted. `GIVE_UP` times as many losses as
   workers, without one finished episode between them, end the training with the last one's own words.
6. The fleet runs at most `ahead` decisions ahead of the learner: while the queue holds as many, a worker whose episode
   has ended rests before its next; never within an episode.

With a lockstep fleet (LocalFleet) there is no thread: `collect()` itself turns the loop until it has what it was asked
for. No weights arrive meanwhile and the order of answers is fixed, so equal seeds give equal trainings.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ray.exceptions import RayTaskError
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from esper.platform.console import say
from esper.platform.contracts import GraftAction, Instance, Transition
from esper.platform.errors import UserError
from esper.platform.seeding import derive, stream
from esper.platform.spaces import observation
from esper.platform.telemetry import Telemetry, TelemetrySpace
from esper.policies.simic.fleet import Answer, Fleet, process_lost, sentence
from esper.policies.simic.net import GardenerNet
from esper.policies.simic.policy import batch, draw

GIVE_UP = 6  # with the pauses below, a fleet whose processes all die at once has half a minute to come back
PAUSE, LONGEST_PAUSE = 1.0, 10.0  # seconds before the next try once a process is gone; doubles with each in a row
TURN = 0.2  # seconds after which the loop looks at pauses, the queue and `stop` though no answer has come


@dataclass
class _Seat:
    """A logical worker and what it is doing.

    Attributes:
        number: of its episode; none while it rests.
        episode: so far; none until the reset is answered.
        index: the row asked for by the call in flight.
        chosen: extra model outputs of that choice.
        since: when the call in flight was sent.
        failures: in a row.
        rest_until: no reset before this moment.
    """

    number: int | None = None
    episode: SingleAgentEpisode | None = None
    index: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)
    since: float = 0.0
    failures: int = 0
    rest_until: float = 0.0


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
    """

    def __init__(
        self,
        fleet: Fleet,
        net: GardenerNet,
        space: TelemetrySpace,
        *,
        seed: int,
        ahead: int,
        first_episode: int = 0,
        instances: Callable[[int], Instance | None] | None = None,
    ) -> None:
        self._fleet, self._net, self._space = fleet, net.eval(), space
        self._seed, self._ahead, self._wanted = seed, ahead, 0
        self._instances = instances or (lambda number: None)
        self._seats = [_Seat() for _ in range(fleet.size)]
        self._losses = 0  # in a row
        self._weights_seq_no = 0
        # Shared with the learner's thread, under `_changed`.
        self._changed = threading.Condition()
        self._queue: deque[SingleAgentEpisode] = deque()
        self._new_weights: tuple[Mapping[str, torch.Tensor], int] | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._busy = 0.0  # worker-seconds with a call in flight, since the last `counters()`
        self._looked = time.monotonic()
        self.next_episode = first_episode
        self.counts: Counter[str] = Counter(failures=0, refused=0)
        self._thread: threading.Thread | None = None

    # -- The learner's side --------------------------------------------------------------------------------------

    def collect(self, decisions: int) -> list[SingleAgentEpisode]:
        """Wait for whole episodes of at least `decisions` decisions and take them, the first ended first.

        Raises:
            UserError: the workers do nothing but fail, or one says what a user can mend.
            Exception: whatever ended the dispatcher's thread.
        """
        if not self._fleet.lockstep and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="simic-dispatcher", daemon=True)
            self._thread.start()
        self._wanted = decisions
        while self._fleet.lockstep and self._queued() < decisions:
            self._turn()
        with self._changed:
            while self._queued() < decisions and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            taken: list[SingleAgentEpisode] = []
            while sum(map(len, taken)) < decisions:
                taken.append(self._queue.popleft())
            self._wanted = 0
            self._changed.notify_all()
        return taken

    def set_weights(self, weights: Mapping[str, torch.Tensor], weights_seq_no: int) -> None:
        """Choose by these weights from the next batch on."""
        with self._changed:
            self._new_weights = (weights, weights_seq_no)

    def busy_fraction(self) -> float | None:
        """Mean fraction of the time since the last call in which a worker had a call in flight; none in lockstep."""
        if self._fleet.lockstep:
            return None
        with self._changed:
            now = time.monotonic()
            flying = [seat for seat in self._seats if seat.number is not None]
            busy = self._busy + sum(now - max(seat.since, self._looked) for seat in flying)
            fraction = busy / max(1e-9, (now - self._looked) * len(self._seats))
            self._busy, self._looked = 0.0, now
        return min(1.0, fraction)

    def stop(self) -> None:
        """End the thread and the workers."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
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
        """Start what may start, take what is ready, answer it in one batch."""
        flying = self._start_episodes()
        if not flying:  # all rest: for the learner to take episodes, or after failures
            with self._changed:
                if not self._stopped:
                    self._changed.wait(TURN)
            return
        waiting: list[tuple[int, Telemetry]] = []
        for worker, answer in self._fleet.ready(TURN):
            telemetry = self._receive(worker, answer)
            if telemetry is not None:
                waiting.append((worker, telemetry))
        if waiting:
            self._swap_weights()
            self._decide(waiting)

    def _start_episodes(self) -> int:
        """Reset the workers that may start; how many have a call in flight then."""
        now = time.monotonic()
        for worker, seat in enumerate(self._seats):
            if seat.number is None and now >= seat.rest_until and self._queued() < max(self._ahead, self._wanted):
                number, self.next_episode = self.next_episode, self.next_episode + 1
                seat.number, seat.episode = number, None
                self._send(worker, "reset", self._instances(number), derive(self._seed, "episode", number))
        return sum(seat.number is not None for seat in self._seats)

    def _receive(self, worker: int, answer: Answer) -> Telemetry | None:
        """Book an answer; the telemetry, if it wants an action."""
        seat = self._seats[worker]
        self._book_time(seat)
        if isinstance(answer, Exception):
            self._lose(worker, answer, "failures")
            return None
        telemetry = answer.telemetry if isinstance(answer, Transition) else answer
        problem = telemetry.problems(self._space)
        if problem is None and isinstance(answer, Transition) and not np.isfinite(answer.reward):
            problem = f"reward {answer.reward} is not finite"
        if problem is not None:
            self._lose(worker, ValueError(f"telemetry refused: {problem}"), "refused")
            return None
        if not isinstance(answer, Transition):
            seat.episode = SingleAgentEpisode(id_=str(seat.number))
            seat.episode.add_env_reset(observation(telemetry))
            return telemetry
        assert seat.episode is not None
        ended = answer.terminated or answer.truncated
        seat.episode.add_env_step(
            observation(telemetry),
            seat.index,
            answer.reward,
            step_info(answer),
            terminated=answer.terminated,
            truncated=answer.truncated,
            extra_model_outputs=seat.chosen,
        )
        if not ended:
            return telemetry
        self._finish(seat)
        return None

    def _finish(self, seat: _Seat) -> None:
        assert seat.episode is not None
        with self._changed:
            self._queue.append(seat.episode.to_numpy())
            self._changed.notify_all()
        seat.number, seat.episode = None, None
        seat.failures = self._losses = 0

    def _lose(self, worker: int, error: Exception, count: str) -> None:
        """Drop a worker's episode; give up if nothing else happens."""
        seat = self._seats[worker]
        self.counts[count] += 1
        self._losses += 1
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError):
            raise cause
        if self._losses >= GIVE_UP * len(self._seats):
            raise UserError(
                f"{self._losses} episodes in a row were lost and none was finished; the last one by "
                f"{sentence(error).rstrip('.')}: mend that, and try one run with `esper train`."
            )
        say(f"worker {worker} lost episode {seat.number}: {sentence(error)}")
        pause = min(LONGEST_PAUSE, PAUSE * 2**seat.failures) if process_lost(error) else 0.0
        seat.number, seat.episode = None, None
        seat.failures += 1
        seat.rest_until = time.monotonic() + pause
        self._fleet.replace(worker, error)

    def _decide(self, waiting: list[tuple[int, Telemetry]]) -> None:
        """One inference for all, then the replies."""
        with torch.no_grad():
            logits, values = self._net(batch([telemetry for _, telemetry in waiting]))  # (B, A), (B,)
        log_p = logits.log_softmax(dim=-1).numpy()
        for row, (worker, telemetry) in enumerate(waiting):
            seat = self._seats[worker]
            assert seat.number is not None
            uniform = stream(self._seed, "policy", seat.number, telemetry.sequence).random()
            seat.index = draw(logits[row].numpy(), telemetry.mask, uniform)
            seat.chosen = {
                Columns.ACTION_DIST_INPUTS: logits[row].numpy(),
                Columns.ACTION_LOGP: log_p[row, seat.index],
                Columns.VF_PREDS: values[row].numpy(),
                WEIGHTS_SEQ_NO: self._weights_seq_no,
            }
            self._send(worker, "step", GraftAction(seat.index, telemetry.sequence))

    def _swap_weights(self) -> None:
        with self._changed:
            new, self._new_weights = self._new_weights, None
        if new is not None:
            self._net.load_state_dict(new[0])
            self._weights_seq_no = new[1]

    # -- Helpers -------------------------------------------------------------------------------------------------

    def _send(self, worker: int, method: Any, *args: Any) -> None:
        self._seats[worker].since = time.monotonic()
        self._fleet.submit(worker, method, *args)

    def _book_time(self, seat: _Seat) -> None:
        with self._changed:
            now = time.monotonic()
            self._busy += now - max(seat.since, self._looked)
            seat.since = now

    def _queued(self) -> int:
        """Decisions in the queue."""
        with self._changed:  # re-entrant
            return sum(map(len, self._queue))


def step_info(answer: Transition) -> dict[str, float]:
    """What the runner's metrics need of a transition's info: seconds of the worker, and the final loss."""
    info = {key: answer.info[key] for key in ("worked", "waited") if key in answer.info}
    if "summary" in answer.info:
        info["val_loss"] = answer.info["summary"].get("val_loss")
    return info
