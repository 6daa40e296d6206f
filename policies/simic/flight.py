"""Flight: an episode under way, as the dispatcher knows it. Any worker can carry out its next order."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from esper.platform.contracts import Instance, Order, Reply, Transition
from esper.platform.spaces import observation
from esper.platform.telemetry import TelemetrySpace

REACHED = ("budget_fraction", "val_loss", "parameters")  # of a run's point: what the live view shows


@dataclass(frozen=True)
class Choice:
    """A chosen action and what chose it: kept until the outcome comes, for new weights may be there by then.

    Attributes:
        index: the row.
        logits: float32 (A,).
        log_p: of that row.
        value: what the network said of the state.
        weights: number of the weights that chose.
    """

    index: int
    logits: np.ndarray
    log_p: float
    value: float
    weights: int

    def outputs(self) -> dict[str, Any]:
        """As RLlib's extra model outputs."""
        return {
            Columns.ACTION_DIST_INPUTS: self.logits,
            Columns.ACTION_LOGP: np.float32(self.log_p),
            Columns.VF_PREDS: np.float32(self.value),
            WEIGHTS_SEQ_NO: self.weights,
        }


@dataclass
class Flight:
    """See the module.

    Attributes:
        number: of the episode.
        seed: of the episode.
        instance: as for `Run.reset`.
        actions: rows chosen so far; the last has no outcome yet.
        episode: what has been observed; none before the first observation.
        choice: that of the last action.
        expected: seconds that the order under way should take, by the run's clock.
        missed: times that the order under way was lost, by cause.
        doing: the last action in words, for the view.
        reached: budget fraction, loss and parameters at the last observation, as far as known.
    """

    number: int
    seed: int
    instance: Instance | None
    actions: list[int] = field(default_factory=list)
    episode: SingleAgentEpisode | None = None
    choice: Choice | None = None
    expected: float = 0.0
    missed: dict[str, int] = field(default_factory=dict)
    doing: str | None = None
    reached: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> Order:
        """What a worker has to do next."""
        return Order(self.number, self.seed, self.instance, tuple(self.actions), fresh="tries" in self.missed)

    def problem(self, reply: Reply, space: TelemetrySpace) -> str | None:
        """Why a reply to the order under way must not be used (another's, of wrong form, not finite), or None."""
        try:
            return self._problem(reply, space)
        except (TypeError, ValueError, AttributeError) as error:
            return f"it cannot be read ({type(error).__name__}: {error})"

    def _problem(self, reply: Reply, space: TelemetrySpace) -> str | None:
        answer, telemetry = reply.answer, reply.telemetry
        if reply.episode != self.number or telemetry.sequence != len(self.actions):
            return (
                f"it is of episode {reply.episode}, observation {telemetry.sequence}, "
                f"but {len(self.actions)} of {self.number} was asked for"
            )
        if isinstance(answer, Transition) != bool(self.actions):
            return "it is no observation" if isinstance(answer, Transition) else "it has no outcome"
        if isinstance(answer, Transition) and not np.isfinite(answer.reward):
            return f"reward {answer.reward} is not finite"
        if not (np.isfinite(reply.expected) and reply.expected >= 0):
            return f"expected {reply.expected} is no duration"
        return telemetry.problems(space)

    def take(self, reply: Reply) -> None:
        """Take in a reply without a problem."""
        answer, self.expected = reply.answer, reply.expected
        if not isinstance(answer, Transition):
            self.begin(observation(answer))
            return
        point, summary = answer.info.get("point", {}), answer.info.get("summary")
        self.reached = {key: point[key] for key in REACHED if key in point}
        info = {"worked": reply.worked, "waited": reply.waited}  # for the runner's metrics, as the final loss
        if summary is not None:
            info["val_loss"] = summary.get("val_loss")
        seen = observation(answer.telemetry)
        self.go_on(seen, float(answer.reward), info, answer.terminated, answer.truncated)

    def begin(self, observation: dict[str, np.ndarray]) -> None:
        """Take in the first observation."""
        self.episode = SingleAgentEpisode(id_=str(self.number))
        self.episode.add_env_reset(observation)
        self.missed.clear()

    def choose(self, choice: Choice) -> None:
        """Note the next action."""
        self.actions.append(choice.index)
        self.choice = choice

    def go_on(
        self, observation: dict[str, np.ndarray], reward: float, info: dict[str, Any], terminated: bool, truncated: bool
    ) -> None:
        """Take in what the chosen action led to."""
        assert self.episode is not None
        assert self.choice is not None
        self.episode.add_env_step(
            observation,
            self.choice.index,
            reward,
            info,
            terminated=terminated,
            truncated=truncated,
            extra_model_outputs=self.choice.outputs(),
        )
        self.missed.clear()
