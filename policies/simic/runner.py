"""SimicEnvRunner: PPO's only, local EnvRunner; `sample()` only takes ended episodes, so updates stall no worker.

See RLlib's `env/external/env_runner_server_for_external_inference.py` for what a runner owes.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED, NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO

from esper.platform.memory import give_back
from esper.policies.simic.baseline import Baseline, Played
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.metrics import Sample, sample_metrics, update_metrics
from esper.policies.simic.net import ControllerNet

Weights = dict[str, torch.Tensor]


def net_weights(module: dict[str, Any]) -> Weights:
    """A SimicModule's state as the network's, copied: the learner goes on changing its own."""
    return {name.removeprefix("net."): torch.tensor(np.array(value)) for name, value in module.items()}


class SimicEnvRunner(EnvRunner):
    """Whole episodes from a dispatcher, chosen by the learner's latest weights; `baseline` shapes rewards."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.baseline = Baseline()
        self._settings = cast(PPOConfig, self.config)
        self._dispatcher: Dispatcher | None = None
        self._check: Callable[[], None] | None = None
        self._weights: Weights = {}
        self._weights_seq_no = 0
        self._sample: Sample | None = None  # the last
        self._before: dict[str, float] = {}  # metrics of it, before the update

    @property
    def dispatcher(self) -> Dispatcher:
        """Where episodes come from."""
        assert self._dispatcher is not None, "not connected"
        return self._dispatcher

    def connect(self, dispatcher: Dispatcher, check: Callable[[], None] | None) -> None:
        """Take episodes from `dispatcher`; `check` is called while waiting, and may raise."""
        self._dispatcher, self._check = dispatcher, check
        dispatcher.set_weights(self._weights, self._weights_seq_no)

    def sample(self, **kwargs: Any) -> list[SingleAgentEpisode]:
        """Whole episodes of at least `train_batch_size` decisions in order of beginning, with shaped rewards."""
        self._sample = None
        give_back()
        episodes = self.dispatcher.collect(self._settings.total_train_batch_size, self._check)
        self._sample = sample = Sample.of(episodes)
        played = [self._played(episode) for episode in episodes]
        potential = [self.baseline.potential(each.states[:-1], each.instance) for each in played]
        said = np.concatenate(potential) + self.baseline.scale * sample.values
        self._before = sample_metrics(sample, said, self._weights_seq_no) | self._fleet_metrics(sample)
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED, len(sample.actions), reduce="sum")  # RLlib samples until enough
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, len(sample.actions), reduce="lifetime_sum")
        for episode, shaped in zip(episodes, self.baseline.shaped(played), strict=True):
            episode.rewards.data = shaped  # `set_rewards` would check each against a space, with a warning each
        self.baseline.update(played)
        return episodes

    def get_metrics(self) -> Any:
        """RLlib's metrics of the last sample."""
        return self.metrics.reduce()

    def get_spaces(self) -> dict[str, Any]:
        """The environment's spaces, which are the module's: there are no connectors between."""
        spaces = (self.config.observation_space, self.config.action_space)
        return {INPUT_ENV_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: the learner has the weights, and `learner.py` keeps the rest."""
        return {}

    def set_state(self, state: Any) -> None:
        """Take weights that are newer or unnumbered."""
        if isinstance(state, ray.ObjectRef):
            state = ray.get(state)
        number = state.get(WEIGHTS_SEQ_NO, 0)
        if COMPONENT_RL_MODULE not in state or 0 < number <= self._weights_seq_no:
            return
        weights = state[COMPONENT_RL_MODULE]
        if isinstance(weights, ray.ObjectRef):
            weights = ray.get(weights)
        self._weights, self._weights_seq_no = net_weights(weights.get(DEFAULT_MODULE_ID, weights)), number
        if self._dispatcher is not None:
            self._dispatcher.set_weights(self._weights, number)

    def assert_healthy(self) -> None:
        """Check that a dispatcher is connected."""
        assert self._dispatcher is not None

    def stop(self) -> None:
        """End the fleet; a journal keeps the episodes under way."""
        if self._dispatcher is not None:
            self._dispatcher.stop()

    def iteration(self) -> dict[str, float]:
        """Metrics of the last sample and its update; call it once the new weights are here."""
        assert self._sample is not None
        net = ControllerNet(self._settings.model_config["hidden"])
        net.load_state_dict(self._weights)
        return self._before | update_metrics(self._sample, net, float(self._settings.clip_param or 0))

    def _played(self, episode: SingleAgentEpisode) -> Played:
        instance = self.dispatcher.instance(int(episode.id_))
        name = None if instance is None else instance.model_dump_json()
        return Played(name, episode.get_observations()["globals"], episode.get_rewards(), episode.is_terminated)

    def _fleet_metrics(self, sample: Sample) -> dict[str, float]:
        dispatcher = self.dispatcher
        progress, begun = dispatcher.progress(), dispatcher.begun
        metrics = {
            "learned_share": progress.learned / begun,
            "overtaking": dispatcher.waiting(),
            **progress.counts,
        }
        busy = dispatcher.busy_fraction()
        if busy is not None:
            waited, worked = (sum(info.get(key, 0.0) for info in sample.infos) for key in ("waited", "worked"))
            metrics |= {"busy": busy, "waiting": waited / max(1e-9, waited + worked)}
        return metrics
