"""EpisodeWorker: carries out orders on a run, saves it at each decision, and takes up what another worker left.

An order names every action of its episode so far (`platform/contracts.py::Order`). A worker whose run stands one
action short of that takes the step. Any other worker (a new process after a death, or one that was busy elsewhere)
first gets there: from the newest save whose actions are the first of the order's, else from the start, and through the
actions that are left. By the reference clock that gives the same numbers to the bit, so an episode never notices who
trains it; by the wall clock what is trained again takes other times, and the loss differs by that.
"""

import time
from collections.abc import Callable
from typing import Any

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction, Order, Reply, Run, Transition
from esper.platform.errors import UserError
from esper.platform.telemetry import Telemetry

KEY = "order"  # in a save's values: where in which episode it was made, and the answer given there


class EpisodeWorker:
    """See the module.

    Args:
        make_run: makes the run.
        saves: where it is saved at each decision; none saves nothing.
    """

    def __init__(self, make_run: Callable[[], Run], saves: CheckpointStore | None = None) -> None:
        self._run = make_run()
        self._saves = saves
        self._at: Order | None = None  # the last order carried out; none where the run cannot be gone on with
        self._answered = time.perf_counter()

    def advance(self, order: Order) -> Reply:
        """Carry out an order.

        Raises:
            UserError: what a user can mend, in the run's words.
            RuntimeError: an action is not legal when it is done again: by the wall clock, a run may then stand
                elsewhere in its budget.
        """
        begun = time.perf_counter()
        waited = begun - self._answered
        if self._saves is not None and self._at is not None and self._at.episode != order.episode:
            self._saves.drop(
                save_name(self._at.episode)
            )  # its last answer has arrived: else it would have been asked for again
        answer, redone = self._carry_out(order)
        self._at = order
        if self._saves is not None:
            self._save(order, answer)
        self._answered = time.perf_counter()
        return Reply(
            order.episode,
            answer,
            expected=self._run.expected_seconds(),
            redone=redone,
            waited=waited,
            worked=self._answered - begun,
            unsaved=self._saves.failed if self._saves is not None else None,
        )

    def _carry_out(self, order: Order) -> tuple[Telemetry | Transition, int]:
        """The answer, and how many decisions were done again for it."""
        at, self._at = self._at, None  # whatever raises on the way leaves a run that is not to be gone on with
        if at is not None and order.actions and _step_from(at, order):
            return self._step(order.actions[-1]), 0
        done, answer = self._restored(order)
        if answer is None:
            done, answer = 0, self._run.reset(order.instance, order.seed)
        for action in order.actions[done:]:
            try:
                answer = self._step(action)
            except UserError as error:
                raise RuntimeError(f"the episode could not be done again: {error}") from error
        return answer, max(0, len(order.actions) - 1 - done)

    def _step(self, action: int) -> Transition:
        return self._run.step(GraftAction(action, self._run.telemetry.sequence))

    def _save(self, order: Order, answer: Telemetry | Transition) -> None:
        assert self._saves is not None
        values, tensors = self._run.state()
        values[KEY] = {"seed": order.seed, "actions": list(order.actions), "answer": _outcome(answer)}
        self._saves.save(save_name(order.episode), values, tensors)

    def _restored(self, order: Order) -> tuple[int, Telemetry | Transition | None]:
        """Take up the order's episode from a save: (actions done there, the answer given there); (0, None) without."""
        if self._saves is None:
            return 0, None
        if not order.actions or order.fresh:
            self._saves.drop(save_name(order.episode))  # an earlier way through it, or a spoilt one
            return 0, None
        found = self._saves.find(save_name(order.episode))
        if found is None:
            return 0, None
        values, tensors = found
        kept = values.get(KEY, {})
        actions = tuple(kept.get("actions", ()))
        if kept.get("seed") != order.seed or order.actions[: len(actions)] != actions:
            self._saves.drop(save_name(order.episode))  # of another way through this episode
            return 0, None
        self._run.load(values, tensors)
        telemetry, outcome = self._run.telemetry, kept["answer"]
        return len(actions), telemetry if outcome is None else Transition(telemetry, **outcome)


def save_name(episode: int) -> str:
    """The name of an episode's checkpoint."""
    return f"episode-{episode:09d}"


def _step_from(at: Order, order: Order) -> bool:
    """Whether `order` is one action further than `at`."""
    return (at.episode, at.seed, at.actions) == (order.episode, order.seed, order.actions[:-1])


def _outcome(answer: Telemetry | Transition) -> dict[str, Any] | None:
    """What a save keeps of an answer beside the telemetry, which the run makes anew."""
    if not isinstance(answer, Transition):
        return None
    return {
        "reward": answer.reward,
        "terminated": answer.terminated,
        "truncated": answer.truncated,
        "info": answer.info,
    }
