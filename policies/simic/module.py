"""SimicModule: ControllerNet as RLlib's RLModule."""

from typing import Any

from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from esper.policies.simic.net import ControllerNet


class SimicModule(TorchRLModule, ValueFunctionAPI):
    """The network under the names that RLlib's PPO calls. `model_config`: `hidden`, its width."""

    def setup(self) -> None:
        """Make the network."""
        self.net = ControllerNet(self.model_config["hidden"])

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.net.logits(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Values (B,). The value has a trunk of its own, so there are no embeddings to share."""
        return self.net.value(batch[Columns.OBS])
