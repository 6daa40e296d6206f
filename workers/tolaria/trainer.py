"""The training engine: one host, its optimizer and its text; optimizer steps and evaluation.

It knows nothing of budgets, ledgers or policies: its caller says at which rate to step, and reads what was measured.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import Instance
from esper.platform.seeding import derive, torch_stream
from esper.platform.spec import OptimizerSpec, RunSpec
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import Blueprint
from esper.workers.tolaria.batches import Batches, held_out, held_out_sample
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.device import pick_device
from esper.workers.tolaria.hosts import host_config
from esper.workers.tolaria.model.transformer import TransformerHost

EVAL_TOKENS_AT_ONCE = 16384
CONTRIBUTION_BATCHES = 2  # training batches' worth of held-out text that contributions are measured on


class Trainer:
    """Trains one host.

    Attributes:
        host: the model.
        optimizer: AdamW over exactly its parameters.
        kasmina: grows both.
        steps: optimizer steps done: the data's cursor.
        sample_tokens: held-out tokens that contributions are measured on.
    """

    def __init__(
        self, spec: RunSpec, data: TokenData, blueprints: dict[str, Blueprint], seed: int, instance: Instance
    ) -> None:
        self.device = pick_device(spec)
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._blueprints = blueprints
        self._seed = seed
        born = spec.model_copy(update={"host": spec.host.starting_with(instance.n_layer)})
        self._config = host_config(born, data.manifest.vocab_size)
        block = spec.host.block_size
        self._batches = Batches(data, seed, spec.data.batch_size, block, instance.data, self.device)
        self._held_out = held_out(data, spec.data.eval_tokens, block, self.device)
        self._sample = held_out_sample(data, CONTRIBUTION_BATCHES * spec.data.batch_size, block, self.device)
        self.sample_tokens = self._sample[0].numel()
        self._take(TransformerHost(self._config, torch_stream(seed, "init")))
        self.steps = 0
        self._measured: list[Tensor] = []

    def _take(self, host: TransformerHost) -> None:
        """Train this host from now on, with a new optimizer."""
        self.host = host.to(self.device)
        self.optimizer = make_optimizer(self._spec.optimizer, self.host)
        self.kasmina = Kasmina(
            self.host,
            self.optimizer,
            blueprints=self._blueprints,
            probation_steps=self._spec.growth.probation_steps,
            seed=self._seed,
        )

    def step(self, rate: float) -> None:
        """One optimizer step at the host's learning rate `rate`."""
        if self._spec.host.dropout > 0:
            torch.manual_seed(derive(self._seed, "dropout", self.steps))
        inputs, targets = self._batches.at(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(inputs, targets)
        loss.backward()
        norm, seeds = self.kasmina.clip(self._spec.optimizer.grad_clip)
        self._measured.append(torch.stack((loss.detach(), norm, norm if seeds is None else norm + seeds)))
        for group in self.kasmina.host_groups:
            group["lr"] = rate
        self.kasmina.warm_up()
        self.optimizer.step()
        self.steps += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the fixed held-out set, nats per token."""
        return self._mean_loss(*self._held_out)

    @torch.no_grad()
    def contributions(self, sites: Iterable[str]) -> dict[str, float]:
        """Of each site, the loss with its newest seed masked less the loss with it, nats per token.

        On a small fixed held-out sample, apart from the validation set where the text is long enough.
        """
        whole = self._mean_loss(*self._sample)
        without = {}
        for site in sites:
            with self.kasmina.masked(site):
                without[site] = self._mean_loss(*self._sample) - whole
        return without

    def measured(self, since: int = 0) -> list[list[float]]:
        """Of each step since the last `forget` (from the one numbered `since` on): [loss, norm, norm of all].

        The training loss in nats per token; the norm, before clipping, of the host's gradient; the same with the norms
        of seeds on probation added.
        """
        rows = self._measured[since:]
        return torch.stack(rows).tolist() if rows else []

    @property
    def unread(self) -> int:
        """How many rows `measured` has."""
        return len(self._measured)

    def forget(self) -> None:
        """Drop what was measured."""
        self._measured = []

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

    # -- Saving ------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that `load` needs to go on to the same numbers: JSON values, and copies of tensors by name."""
        names = {id(parameter): name for name, parameter in self.host.named_parameters()}
        tensors = {f"host/{name}": tensor for name, tensor in self.host.own_state().items()}
        groups = []
        for group in self.optimizer.param_groups:
            held = [names[id(parameter)] for parameter in group["params"]]
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": held})
            for name, parameter in zip(held, group["params"], strict=True):
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer/{name}/{key}"] = value
        values = {
            "layout": self.host.layout(),
            "groups": groups,
            "kasmina": self.kasmina.state(),
            "steps": self.steps,
            "measured": self.measured(),
        }
        return values, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def load(self, values: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Become what `state` told of; the tensors are copied."""
        self._take(TransformerHost.with_layout(self._config, values["layout"]))
        self.host.load_own_state(
            {name.removeprefix("host/"): tensor for name, tensor in tensors.items() if name.startswith("host/")}
        )
        parameters = dict(self.host.named_parameters())
        self.optimizer.param_groups[:] = [
            {**group, "betas": tuple(group["betas"]), "params": [parameters[name] for name in group["params"]]}
            for group in values["groups"]
        ]
        self.optimizer.state.clear()
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                owner, _, key = rest.rpartition("/")
                self.optimizer.state[parameters[owner]][key] = tensor.to(self.device, copy=True)
        self.kasmina.load(values["kasmina"])
        self.steps = values["steps"]
        self._measured = [torch.tensor(row, device=self.device) for row in values["measured"]]

    # -- Helpers -----------------------------------------------------------------------------------------------

    def _mean_loss(self, inputs: Tensor, targets: Tensor) -> float:
        """In evaluation mode, in parts of a bounded size."""
        self.host.eval()
        at_once = max(1, EVAL_TOKENS_AT_ONCE // inputs.shape[1])
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(0, len(inputs), at_once):
            part = inputs[i : i + at_once], targets[i : i + at_once]
            total += self._loss(*part).double() * part[0].numel()
        self.host.train()
        return total.item() / inputs.numel()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._spec.dtype == "bfloat16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                logits = self.host(inputs).float()  # (B, T, V)
        else:
            logits = self.host(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
