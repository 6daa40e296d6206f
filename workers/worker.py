"""EpisodeWorker: carries out orders on a run, saves it at each decision, and takes up what another worker left.

An order names every action of its episode so far (`platform/contracts.py::Order`). A worker whose run stands one
action short of that takes the step. Any other worker (a new process after a death, or one that was busy elsewhere)
first gets there: from the newest checkpoint whose actions are the first of the order's, else from the start, and
through the actions that are left. By the reference clock that gives the same numbers to the bit, so an episode never
notices who trains it; by the wall clock what is trained again takes other times, and the loss differs by that.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction, Order, Reply, Run, Transition
from esper.platform.errors import UserError
from esper.platform.telemetry import Telemetry

KEY = "order"  # in a checkpoint's state: where in which episode it was made, and the outcome given there
OUTCOME = ("reward", "terminated", "truncated", "info")  # of a Transition; its telemetry the run makes anew


class EpisodeWorker:
    """See the module.

    Args:
        make_run: makes the run, in the worker's process.
        storage: path or URI of the checkpoints; none saves nothing.

    Attributes:
        store: of the checkpoints.
    """

    def __init__(self, make_run: Callable[[], Run], storage: str | None = None) -> None:
        self._run = make_run()
        self.store = None if storage is None else CheckpointStore(storage)
        self._at: Order | None = None  # the last order carried out; none where the run cannot be gone on with
        self._answered = time.perf_counter()

    def up(self) -> None:
        """Answers once the process is there and its run is made."""

    def advance(self, order: Order) -> Reply:
        """Carry out an order.

        Raises:
            UserError: what a user can mend, in the run's words.
            RuntimeError: an action is not legal when it is done again: by the wall clock, a run may then stand
                elsewhere in its budget.
        """
        begun = time.perf_counter()
        waited = begun - self._answered
        at, self._at = self._at, None  # whatever raises on the way leaves a run that is not to be gone on with
        redone = 0
        if at is not None and order.actions and at == replace(order, actions=order.actions[:-1], fresh=at.fresh):
            answer = self._step(order.actions[-1])
        else:
            if self.store is not None and at is not None and at.episode != order.episode:
                self.store.drop(save_name(at.episode))  # its last answer has arrived: else it would be asked for again
            answer, redone = self._taken_up(order)
        self._at = order
        if self.store is not None:
            self._save(self.store, order, answer)
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

    def _step(self, action: int) -> Transition:
        return self._run.step(GraftAction(action, self._run.telemetry.sequence))

    def _taken_up(self, order: Order) -> tuple[Telemetry | Transition, int]:
        """The answer of a run that stood elsewhere, and how many decisions were done again for it."""
        restored = self._restored(self.store, order) if self.store is not None else None
        done, answer = restored or (0, self._run.reset(order.instance, order.seed))
        for action in order.actions[done:]:
            try:
                answer = self._step(action)
            except UserError as error:
                raise RuntimeError(f"the episode could not be done again: {error}") from error
        return answer, max(0, len(order.actions) - 1 - done)

    def _save(self, store: CheckpointStore, order: Order, answer: Telemetry | Transition) -> None:
        state, tensors = self._run.state()
        outcome = {key: getattr(answer, key) for key in OUTCOME} if isinstance(answer, Transition) else None
        state[KEY] = {"seed": order.seed, "actions": list(order.actions), "outcome": outcome}
        store.save(save_name(order.episode), state, tensors)

    def _restored(self, store: CheckpointStore, order: Order) -> tuple[int, Telemetry | Transition] | None:
        """Load the order's episode from its checkpoint: (actions done there, the answer given there)."""
        name = save_name(order.episode)
        found = store.find(name) if order.actions and not order.fresh else None
        state, tensors = found or ({}, {})
        kept = state.get(KEY)
        if kept is None or kept["seed"] != order.seed or list(order.actions[: len(kept["actions"])]) != kept["actions"]:
            store.drop(name)  # of another way through this episode, or a spoilt one
            return None
        self._run.load(state, tensors)
        telemetry, outcome = self._run.telemetry, kept["outcome"]
        return len(kept["actions"]), telemetry if outcome is None else Transition(telemetry, **outcome)


def save_name(episode: int) -> str:
    """The name of an episode's checkpoint."""
    return f"episode-{episode:09d}"
