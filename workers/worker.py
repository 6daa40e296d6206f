"""EpisodeWorker: carries out orders on a run, saves it at each decision, and continues another worker's episode.

An order names all actions of its episode (`platform/contracts.py::Order`). A worker one action behind takes the step;
any other first replays from the checkpoint whose actions begin the order's, or from the start. The reference clock
makes the replay equal to the bit; with the wall clock, times and losses differ.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import ray

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction, Order, Reply, Run, Transition
from esper.platform.errors import UserError
from esper.platform.telemetry import Telemetry
from esper.workers.tolaria.sampling import opening

KEY = "order"  # in a checkpoint's state: the episode's seed, its actions and the last outcome
SAMPLED = 100  # tokens that the host of an ended episode writes, for the live view
OUTCOME = ("reward", "terminated", "truncated", "info")  # of a Transition; `load` rebuilds its telemetry


class EpisodeWorker:
    """Carries out orders on one run; `storage` is the checkpoints' path or URI, and None saves nothing."""

    def __init__(self, make_run: Callable[[], Run], storage: str | None = None) -> None:
        self._run = make_run()
        self.store = None if storage is None else CheckpointStore(storage)
        self._at: Order | None = None  # the last order carried out; None if the run is unusable
        self._answered = time.perf_counter()

    def up(self) -> None: ...  # answers once the worker is constructed

    def advance(self, order: Order) -> Reply:
        """Carry out an order; RuntimeError where a replayed action is illegal, as the wall clock can make it."""
        begun = time.perf_counter()
        waited = begun - self._answered
        at, self._at = self._at, None  # None if anything below raises: the run is unusable
        redone = 0
        if at is not None and order.actions and at == replace(order, actions=order.actions[:-1], fresh=at.fresh):
            answer = self._run.step(GraftAction(order.actions[-1], self._run.telemetry.sequence))
        else:
            if self.store is not None and at is not None and at.episode != order.episode:
                self.store.drop(save_name(at.episode))  # the next episode's order confirms the last answer
            answer, redone = self._taken_up(order)
        self._at = order
        if isinstance(answer, Transition) and answer.terminated and (text := self._run.sample(SAMPLED)):
            answer.info["summary"]["sample"] = opening(text)
        if self.store is not None:
            state, tensors = self._run.state()
            outcome = {key: getattr(answer, key) for key in OUTCOME} if isinstance(answer, Transition) else None
            state[KEY] = {"seed": order.seed, "actions": list(order.actions), "outcome": outcome}
            self.store.save(save_name(order.episode), state, tensors)
        self._answered = time.perf_counter()
        return Reply(
            order.episode,
            answer,
            expected=self._run.expected_seconds(),
            redone=redone,
            waited=waited,
            worked=self._answered - begun,
            unsaved=self.store.failed if self.store is not None else None,
        )

    def _taken_up(self, order: Order) -> tuple[Telemetry | Transition, int]:
        """Restore or replay the order's episode: (answer, decisions redone)."""
        done, answer = self._restored(order) or (0, self._run.reset(order.instance, order.seed))
        for action in order.actions[done:]:
            try:
                answer = self._run.step(GraftAction(action, self._run.telemetry.sequence))
            except UserError as error:
                raise RuntimeError(f"the episode could not be done again: {error}") from error
        return answer, max(0, len(order.actions) - 1 - done)

    def _restored(self, order: Order) -> tuple[int, Telemetry | Transition] | None:
        """Load the order's episode from its checkpoint: (actions done, answer there)."""
        if self.store is None:
            return None
        name = save_name(order.episode)
        found = self.store.find(name) if order.actions and not order.fresh else None
        kept = found[0].get(KEY) if found else None
        done = kept["actions"] if kept else []
        if not (found and kept and kept["seed"] == order.seed and list(order.actions[: len(done)]) == done):
            self.store.drop(name)  # of other actions, or damaged
            return None
        self._run.load(*found)
        telemetry, outcome = self._run.telemetry, kept["outcome"]
        return len(done), telemetry if outcome is None else Transition(telemetry, **outcome)


# The Ray actor. No restarts: Ray would hold calls until it has room; the fleet starts a new actor instead.
GrowthWorker = ray.remote(max_restarts=0)(EpisodeWorker)


def save_name(episode: int) -> str:
    """An episode's checkpoint name."""
    return f"episode-{episode:09d}"
