"""An episode, under way and played. While under way, any worker can do its next order, and a journal can keep it."""

import base64
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator

from esper.platform.contracts import Instance, Order, Reply, Transition
from esper.platform.frozen import Frozen
from esper.platform.ledger import AXES
from esper.platform.spaces import observation
from esper.platform.telemetry import Candidate, TelemetrySpace

REACHED = ("budget_fraction", "val_loss", "parameters", *AXES)  # of a run's point: for the live view, and what it cost


def _unpacked(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else np.frombuffer(base64.b64decode(value, validate=True), np.float32)


Packed = PlainSerializer(lambda array: base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode())
Floats = Annotated[np.ndarray, PlainValidator(_unpacked), Packed]  # float32; in JSON base64


class Decision(Frozen):
    """What a reply brought, and the action chosen on it: a line of the journal."""

    # A diverged network's value is NaN.
    model_config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=True, ser_json_inf_nan="constants")

    version: Literal[5] = 5
    episode: int  # its number
    k: int  # number of the decision in it
    observation: Floats  # (size,): the telemetry's arrays, one after another
    expected: float  # seconds that the next decision should take, by the run's clock
    # The outcome of the decision before; the first has none.
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    worked: float = 0.0  # seconds
    waited: float = 0.0
    reached: dict[str, Any] = Field(default_factory=dict)  # of `REACHED`, as far as known
    summary: dict[str, Any] = Field(default_factory=dict)  # of an ended run
    # What was chosen: by the time of its outcome there may be new weights. Nothing at an episode's end.
    action: int | None = None  # the row
    logits: Floats | None = None  # (A,)
    log_p: float = 0.0  # of that row
    value: float = 0.0  # what the network said of the state
    weights: int = 0  # number of the weights that chose
    doing: str = ""  # the action in words, for the view


@dataclass(frozen=True)
class Played:
    """An ended episode of K decisions."""

    number: int
    instance: str | None  # its name
    observations: dict[str, np.ndarray]  # float32 (K + 1, …)
    actions: np.ndarray  # int64 (K,)
    logits: np.ndarray  # float32 (K, A), which chose them
    log_p: np.ndarray  # float32 (K,)
    values: np.ndarray  # float32 (K,), as said by the same network
    weights: np.ndarray  # int64 (K,), its number
    rewards: np.ndarray  # nats, float64 (K,)
    terminated: bool  # whether nothing is to come after the last state
    worked: np.ndarray  # seconds (K,)
    waited: np.ndarray  # seconds (K,)
    summary: dict[str, Any] = field(default_factory=dict)  # of the run

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def states(self) -> np.ndarray:
        return self.observations["globals"]

    @property
    def final_loss(self) -> float | None:
        """Validation loss at the end, nats per token; None where it is not known or not finite."""
        return _finite(self.summary.get("val_loss"))

    @property
    def to_come(self) -> np.ndarray:
        """Rewards still to come at each decision, nats (K,)."""
        return np.cumsum(self.rewards[::-1])[::-1]


@dataclass
class InFlight:
    """An episode under way."""

    number: int
    seed: int
    instance: Instance | None
    decisions: list[Decision] = field(default_factory=list)  # one per observation
    candidates: tuple[Candidate, ...] = ()  # meaning of the last observation's rows
    lost: Counter[str] = field(default_factory=Counter)  # the order under way: `deaths` with a process, else `tries`
    since: float = 0.0  # when the order under way was sent
    deadline: float = math.inf

    @property
    def done(self) -> int:
        return max(0, len(self.decisions) - 1)

    @property
    def actions(self) -> tuple[int, ...]:
        """Rows chosen so far; the last has no outcome yet."""
        return tuple(each.action for each in self.decisions if each.action is not None)

    @property
    def order(self) -> Order:
        return Order(self.number, self.seed, self.instance, self.actions, fresh=self.lost["tries"] > 0)

    @property
    def ended(self) -> bool:
        return bool(self.decisions) and (self.decisions[-1].terminated or self.decisions[-1].truncated)

    @property
    def used(self) -> dict[str, float]:
        reached = self.decisions[-1].reached if self.decisions else {}
        return {axis: reached[axis] or 0.0 for axis in AXES if axis in reached}

    def take(self, answer: Any, space: TelemetrySpace) -> Reply:
        """Take in the reply to the order under way; a ValueError says in a clause why it must not be used."""
        reply, asked = Reply.checked(answer), len(self.decisions)
        telemetry, outcome = reply.telemetry, reply.answer
        if (reply.episode, telemetry.sequence) != (self.number, asked):
            its = f"it is of episode {reply.episode}, observation {telemetry.sequence}"
            raise ValueError(f"{its}, but {asked} of {self.number} was asked for")
        if isinstance(outcome, Transition) != bool(asked):
            raise ValueError("it has no outcome" if asked else "it is no observation")
        problem = telemetry.problems(space)
        if problem is not None:
            raise ValueError(problem)
        came: dict[str, Any] = {}
        if isinstance(outcome, Transition):
            point, summary = outcome.info.get("point", {}), outcome.info.get("summary") or {}
            came = {name: getattr(outcome, name) for name in ("reward", "terminated", "truncated")}
            came |= {"worked": reply.worked, "waited": reply.waited, "summary": summary}
            came["reached"] = {key: _finite(point[key]) for key in REACHED if key in point}
        seen = np.concatenate([array.ravel() for array in observation(telemetry).values()])
        self.decisions.append(Decision(episode=self.number, k=asked, observation=seen, expected=reply.expected, **came))
        self.candidates = telemetry.actions
        self.lost.clear()
        return reply

    def choose(self, **choice: Any) -> None:
        self.decisions[-1] = self.decisions[-1].model_copy(update=choice)

    def played(self, space: TelemetrySpace) -> Played:
        chosen, outcomes = self.decisions[:-1], self.decisions[1:]
        return Played(
            number=self.number,
            instance=None if self.instance is None else self.instance.model_dump_json(),
            observations=arrays(np.stack([each.observation for each in self.decisions]), space),
            actions=np.array([each.action for each in chosen]),
            logits=np.array([each.logits for each in chosen]),
            log_p=np.array([each.log_p for each in chosen], np.float32),
            values=np.array([each.value for each in chosen], np.float32),
            weights=np.array([each.weights for each in chosen]),
            rewards=np.array([each.reward for each in outcomes]),
            terminated=outcomes[-1].terminated,
            worked=np.array([each.worked for each in outcomes]),
            waited=np.array([each.waited for each in outcomes]),
            summary=outcomes[-1].summary,
        )


def arrays(flat: np.ndarray, space: TelemetrySpace) -> dict[str, np.ndarray]:
    """Observations (N, size) as the telemetry's arrays, (N, …) by name; a ValueError where they are of another size."""
    ends = np.cumsum([math.prod(shape) for shape in space.shapes.values()])
    parts = np.split(flat, ends[:-1], axis=1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(space.shapes.items(), parts, strict=True)}


def _finite(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None  # JSON has no NaN
