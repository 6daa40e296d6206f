"""ControllerNet as RLlib's RLModule, and PPO's learner, whose updates a resumed training repeats.

1. Advantages are standardised over decisions alone: RLlib adds a row to each episode, for its last state's value.
2. The seed and the update's number fix the order of minibatches.
3. The loss has `anchor` · KL(policy ‖ anchor) of each decision, where the batch has an anchor's logits: refining
   what is known already must not destroy it (Vieillard et al. 2020, 2003.14089).
"""

from typing import Any, cast

import numpy as np
import torch
import tree
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from torch import Tensor

from esper.platform.adamw import EagerAdamW
from esper.platform.seeding import derive
from esper.policies.simic.net import ControllerNet, divergence

ANCHOR = "anchor_logits"  # a batch's column, float32 (B, A)
SEED = "seed"  # in `learner_config_dict`: with its own RLlib sets torch's deterministic mode, which imports a compiler
SMALLEST = 1e-4  # standard deviation that advantages are divided by; RLlib's


class SimicModule(TorchRLModule, ValueFunctionAPI):
    """ControllerNet under the names that RLlib's PPO calls; `model_config`: `hidden`, its width."""

    def setup(self) -> None:
        self.net = ControllerNet(self.model_config["hidden"])

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.net.logits(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Values (B,); without embeddings, since the value has its own trunk."""
        return self.net.value(batch[Columns.OBS])


class DecisionsOnly(ConnectorV2):
    """Drops the rows that RLlib added, and standardises the advantages of the rest."""

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        rows = batch[DEFAULT_MODULE_ID]
        real = rows.pop(Columns.LOSS_MASK)
        rows = cast(dict[str, Any], tree.map_structure(lambda column: column[real], rows))
        advantages = rows[Postprocessing.ADVANTAGES]
        spread = advantages.std(correction=0).clamp(min=SMALLEST)
        rows[Postprocessing.ADVANTAGES] = (advantages - advantages.mean()) / spread
        return {DEFAULT_MODULE_ID: rows}


class SimicLearner(PPOTorchLearner):
    """PPO's learner with the differences above."""

    def build(self) -> None:
        torch.manual_seed(self.config.learner_config_dict[SEED])
        super().build()
        assert self._learner_connector is not None
        self._learner_connector.append(DecisionsOnly())

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        parameters = self.get_parameters(self.module[module_id])
        optimizer = EagerAdamW(cast(Any, parameters), weight_decay=0.0)  # RLlib's Adam, which imports a compiler
        given: Any = {"optimizer": optimizer, "params": parameters, "lr_or_lr_schedule": config.lr}
        self.register_optimizer(module_id=module_id, **given)

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        given: Any = {"module_id": module_id, "config": config, "batch": batch, "fwd_out": fwd_out}
        loss = cast(Tensor, super().compute_loss_for_module(**given))
        if ANCHOR not in batch:
            return loss
        kl = divergence(fwd_out[Columns.ACTION_DIST_INPUTS], batch[ANCHOR]).mean()
        return loss + config.learner_config_dict[ANCHOR] * kl

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Seed numpy's global generator, by which RLlib shuffles."""
        super().before_gradient_based_update(timesteps=timesteps)
        number = self.get_state(components=[])[WEIGHTS_SEQ_NO]
        np.random.seed(derive(self.config.learner_config_dict[SEED], "minibatches", number) % 2**32)

    def set_kl_coefficient(self, value: float) -> None:
        """Go on with an adaptive KL coefficient, which RLlib's state leaves out."""
        cast(Tensor, self.curr_kl_coeffs_per_module[DEFAULT_MODULE_ID]).fill_(value)
