"""The training engine: one host, its optimizer and its text; optimizer steps and evaluation.

It knows nothing of budgets, ledgers or policies: its caller says at which rate to step, and reads what was measured.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import Instance
from esper.platform.seeding import derive, torch_stream
from esper.platform.spec import OptimizerSpec, RunSpec
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import Blueprint
from esper.workers.tolaria.batches import Batches, held_out
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.device import pick_device
from esper.workers.tolaria.hosts import make_host

EVAL_TOKENS_AT_ONCE = 16384


class Trainer:
    """Trains one host.

    Attributes:
        host: the model.
        optimizer: AdamW over exactly its parameters.
        kasmina: grows both.
        steps: optimizer steps done.
    """

    def __init__(
        self, spec: RunSpec, data: TokenData, blueprints: dict[str, Blueprint], seed: int, instance: Instance
    ) -> None:
        self.device = pick_device(spec)
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._seed = seed
        host_spec = spec.host.model_copy(update={"n_layer": instance.n_layer or spec.host.n_layer})
        self.host = make_host(
            spec.model_copy(update={"host": host_spec}), data.manifest.vocab_size, torch_stream(seed, "init")
        ).to(self.device)
        self.optimizer = make_optimizer(spec.optimizer, self.host)
        self.kasmina = Kasmina(
            self.host,
            self.optimizer,
            blueprints=blueprints,
            probation_steps=spec.growth.probation_steps,
            seed=seed,
        )
        block = spec.host.block_size
        self._batches = Batches(data, seed, spec.data.batch_size, block, instance.data, self.device)
        self._held_out = held_out(data, spec.data.eval_tokens, block, self.device)
        self.steps = 0
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def step(self, rate: float) -> None:
        """One optimizer step at the host's learning rate `rate`."""
        if self._spec.host.dropout > 0:
            torch.manual_seed(derive(self._seed, "dropout", self.steps))
        inputs, targets = self._batches.at(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(inputs, targets)
        loss.backward()
        self._losses.append(loss.detach())
        self._norms.append(self.kasmina.clip(self._spec.optimizer.grad_clip))
        for group in self.optimizer.param_groups[:HOST_GROUPS]:
            group["lr"] = rate
        self.kasmina.warm_up()
        self.optimizer.step()
        self.steps += 1

    def graft(self, site: str, blueprint: str) -> None:
        """Grow the host; its output does not change."""
        self.kasmina.graft(site, blueprint)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the fixed held-out set, nats per token."""
        self.host.eval()
        inputs, targets = self._held_out
        at_once = max(1, EVAL_TOKENS_AT_ONCE // inputs.shape[1])
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(0, len(inputs), at_once):
            part = inputs[i : i + at_once], targets[i : i + at_once]
            total += self._loss(*part).double() * part[0].numel()
        self.host.train()
        return total.item() / inputs.numel()

    def take_losses(self) -> list[float]:
        """Training losses since the last call, a value per step, nats per token."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).tolist() if losses else []

    def take_norms(self) -> list[float]:
        """The host's gradient norms (before clipping) since the last call, a value per step."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).tolist() if norms else []

    def site_norms(self) -> dict[str, tuple[float, float]]:
        """Site id → (norm of the last gradient, as clipped; norm of the last update), over the site's weight norm.

        The update is read off AdamW's state after the step, weight decay apart. Sites that no gradient reached are
        left out.
        """
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        names, rows = [], []
        for site in self.host.injection_specs():
            parameters = [p for p in self.host.written_by(site.id) if p.grad is not None]
            if parameters:
                names.append(site.id)
                rows.append(
                    torch.stack(
                        [
                            _norm(p.detach() for p in parameters),
                            _norm(p.grad for p in parameters if p.grad is not None),
                            _norm(_update(self.optimizer.state[p], p, groups[id(p)]) for p in parameters),
                        ]
                    )
                )
        if not rows:
            return {}
        return {
            name: (gradient / max(weight, 1e-12), update / max(weight, 1e-12))
            for name, (weight, gradient, update) in zip(names, torch.stack(rows).tolist(), strict=True)
        }

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._spec.dtype == "bfloat16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                logits = self.host(inputs).float()  # (B, T, V)
        else:
            logits = self.host(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


HOST_GROUPS = 2  # matrices, then biases and norms; every later group is a seed's


def make_optimizer(spec: OptimizerSpec, host: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone (Loshchilov & Hutter 2019, 1711.05101)."""
    matrices = [p for p in host.parameters() if p.dim() >= 2]
    others = [p for p in host.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, fused=True)


def _update(state: dict, parameter: Tensor, group: dict) -> Tensor:
    """The last AdamW update of a parameter, learning rate included (1711.05101, algorithm 2, line 12)."""
    if not state:
        return torch.zeros_like(parameter)
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    first = state["exp_avg"] / (1 - beta1**step)
    second = state["exp_avg_sq"] / (1 - beta2**step)
    return group["lr"] * first / (second.sqrt() + group["eps"])


def _norm(tensors: Iterator[Tensor]) -> Tensor:
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum().sqrt()
