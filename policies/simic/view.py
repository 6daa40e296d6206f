"""What can be seen of a worker from outside, at any moment: a snapshot, made by the dispatcher and read by displays."""

from dataclasses import dataclass
from typing import Literal, get_args

State = Literal["starting", "training", "resting"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class WorkerView:
    """A logical worker now; what is not known yet, or does not apply, is None.

    Attributes:
        worker: its number, from 0; -1 of one that has none yet.
        state: its process starts, it has an episode, it rests between episodes.
        episode: number of the one under way.
        decision: how many actions of it have been chosen.
        budget_used: fraction of the episode's budget, from 0 to 1.
        loss: validation loss at the last decision, in nats per token.
        parameters: of its network now.
        action: the last one, as text.
        seconds: that the last decision took.
    """

    worker: int
    state: State
    episode: int | None = None
    decision: int | None = None
    budget_used: float | None = None
    loss: float | None = None
    parameters: int | None = None
    action: str | None = None
    seconds: float | None = None
