"""Flight: an episode under way, as the dispatcher knows it. Any worker can carry out its next order."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from esper.platform.contracts import Instance, Order


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
