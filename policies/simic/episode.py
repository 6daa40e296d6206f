"""An episode under way, as the dispatcher and its journal know it; any worker can do its next order."""

import base64
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from esper.platform.contracts import Instance, Order, Reply, Transition
from esper.platform.ledger import AXES
from esper.platform.spaces import observation
from esper.platform.telemetry import TelemetrySpace

REACHED = ("budget_fraction", "val_loss", "parameters", *AXES)  # of a run's point: for the live view, and what it cost


@dataclass(frozen=True)
class Choice:
    """An action and what chose it: by the time of its outcome there may be new weights."""

    action: int  # the row
    logits: np.ndarray  # float32 (A,)
    log_p: float  # of that row
    value: float  # what the network said of the state
    weights: int  # number of the weights that chose
    doing: str  # the action in words, for the view

    def outputs(self) -> dict[str, Any]:
        """RLlib's extra model outputs."""
        return {
            Columns.ACTION_DIST_INPUTS: self.logits,
            Columns.ACTION_LOGP: np.float32(self.log_p),
            Columns.VF_PREDS: np.float32(self.value),
            WEIGHTS_SEQ_NO: self.weights,
        }


@dataclass
class InFlight:
    """An episode under way."""

    number: int
    seed: int
    instance: Instance | None
    actions: list[int] = field(default_factory=list)  # rows chosen so far; the last has no outcome yet
    episode: SingleAgentEpisode | None = None  # what has been observed; none before the first observation
    choice: Choice | None = None  # that of the last action
    expected: float = 0.0  # seconds that the order under way should take, by the run's clock
    lost: Counter[str] = field(default_factory=Counter)  # the order under way: `deaths` with a process, else `tries`
    reached: dict[str, Any] = field(default_factory=dict)  # of `REACHED`, at the last observation, as far as known

    @property
    def order(self) -> Order:
        """What a worker has to do next."""
        return Order(self.number, self.seed, self.instance, tuple(self.actions), fresh=self.lost["tries"] > 0)

    @property
    def ended(self) -> bool:
        """Whether the last outcome has come."""
        return self.episode is not None and self.episode.is_done

    @property
    def used(self) -> dict[str, float]:
        """Amount used of each known ledger axis."""
        return {axis: self.reached[axis] or 0.0 for axis in AXES if axis in self.reached}

    @property
    def decisions(self) -> int:
        """Number of decisions whose outcome has come."""
        return 0 if self.episode is None else len(self.episode)

    def whole(self) -> SingleAgentEpisode:
        """The ended episode, numpy'ised."""
        assert self.episode is not None
        return self.episode.to_numpy()

    @property
    def observation(self) -> dict[str, np.ndarray]:
        """The last one, an element of `observation_space`."""
        assert self.episode is not None
        return self.episode.get_observations(-1)

    def checked(self, reply: Any, space: TelemetrySpace) -> Reply:
        """A usable reply to the order under way; a ValueError says in a clause why it must not be used."""
        reply = Reply.checked(reply)
        telemetry = reply.telemetry
        if (reply.episode, telemetry.sequence) != (self.number, len(self.actions)):
            raise ValueError(
                f"it is of episode {reply.episode}, observation {telemetry.sequence}, "
                f"but {len(self.actions)} of {self.number} was asked for"
            )
        if isinstance(reply.answer, Transition) != bool(self.actions):
            raise ValueError("it has no outcome" if self.actions else "it is no observation")
        problem = telemetry.problems(space)
        if problem is not None:
            raise ValueError(problem)
        return reply

    def take(self, reply: Reply) -> None:
        """Take in a checked reply."""
        self.expected = reply.expected
        answer, outcome = reply.answer, None
        if isinstance(answer, Transition):
            point, summary = answer.info.get("point", {}), answer.info.get("summary")
            self.reached = {key: _finite(point[key]) for key in REACHED if key in point}
            info = {"worked": reply.worked, "waited": reply.waited}
            if summary is not None:
                info["val_loss"] = _finite(summary.get("val_loss"))
            outcome = {
                "reward": answer.reward,
                "infos": info,
                "terminated": answer.terminated,
                "truncated": answer.truncated,
            }
        self._see(observation(reply.telemetry), outcome)

    def choose(self, choice: Choice) -> None:
        """Note the next action."""
        self.actions.append(choice.action)
        self.choice = choice

    def _see(self, seen: dict[str, np.ndarray], outcome: Mapping[str, Any] | None) -> None:
        self.lost.clear()
        if outcome is None:
            self.episode = SingleAgentEpisode(id_=str(self.number))
            self.episode.add_env_reset(seen)
        else:
            assert self.episode is not None
            assert self.choice is not None
            self.episode.add_env_step(seen, self.choice.action, extra_model_outputs=self.choice.outputs(), **outcome)

    def head(self) -> dict[str, Any]:
        """The journal's first line."""
        instance = None if self.instance is None else self.instance.model_dump(mode="json")
        return {"episode": self.number, "seed": self.seed, "instance": instance}

    def entry(self) -> dict[str, Any]:
        """The last observation, its outcome, and the choice made on it."""
        assert self.episode is not None
        entry: dict[str, Any] = {
            "observation": _packed(np.concatenate([array.ravel() for array in self.observation.values()])),
            "reached": self.reached,
            "expected": self.expected,
        }
        if len(self.episode):
            entry["outcome"] = {
                "reward": float(self.episode.get_rewards(-1)),
                "infos": self.episode.get_infos(-1),
                "terminated": self.episode.is_terminated,
                "truncated": self.episode.is_truncated,
            }
        if self.choice is not None and not self.ended:
            entry["choice"] = {**asdict(self.choice), "logits": _packed(self.choice.logits)}
        return entry

    @classmethod
    def replayed(cls, head: dict[str, Any], entries: list[dict[str, Any]], space: TelemetrySpace) -> "InFlight":
        """The episode of a journal; a KeyError, TypeError or ValueError where it cannot be read."""
        instance = None if head["instance"] is None else Instance.model_validate(head["instance"])
        flight = cls(head["episode"], head["seed"], instance)
        for entry in entries:
            flight.reached, flight.expected = entry["reached"], entry["expected"]
            flight._see(_unpacked_observation(entry["observation"], space), entry.get("outcome"))
            if "choice" in entry:
                kept = entry["choice"]
                flight.choose(Choice(**{**kept, "logits": _unpacked(kept["logits"])}))
        return flight


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode("ascii")


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), np.float32).copy()


def _unpacked_observation(text: str, space: TelemetrySpace) -> dict[str, np.ndarray]:
    flat, sizes = _unpacked(text), [math.prod(shape) for shape in space.shapes.values()]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(space.shapes.items(), parts, strict=True)}


def _finite(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None  # JSON has no NaN
