"""SimicModule: GardenerNet as RLlib's RLModule, and the spaces it lives in."""

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from esper.platform.telemetry import Telemetry, TelemetrySpace
from esper.policies.simic.net import GardenerNet


def observation_space(space: TelemetrySpace) -> gym.spaces.Dict:
    """The telemetry's arrays as float32 boxes; the mask too, as 0 and 1."""
    return gym.spaces.Dict(
        {
            name: gym.spaces.Box(0.0 if name == "mask" else -np.inf, 1.0 if name == "mask" else np.inf, shape)
            for name, shape in space.shapes.items()
        }
    )


def action_space(space: TelemetrySpace) -> gym.spaces.Discrete:
    """A row of the candidates."""
    return gym.spaces.Discrete(space.candidates)


def observation(telemetry: Telemetry) -> dict[str, np.ndarray]:
    """A telemetry as an element of `observation_space`."""
    return {name: np.asarray(array, np.float32) for name, array in telemetry.arrays().items()}


class SimicModule(TorchRLModule, ValueFunctionAPI):
    """The network under the names that RLlib's PPO calls. `model_config`: `hidden`, its width."""

    def setup(self) -> None:
        """Make the network."""
        self.net = GardenerNet(self.model_config["hidden"])

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.net.logits(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Values (B,). The value has a trunk of its own, so there are no embeddings to share."""
        return self.net.value(batch[Columns.OBS])
