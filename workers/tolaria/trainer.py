"""The training engine: one host, its optimizer, its data and its device. The caller gives each step's learning rate.

B examples, T targets of each (none: one), V kinds of targets.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.platform.adamw import EagerAdamW
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.seeding import derive, torch_stream
from esper.platform.spec import RunSpec
from esper.workers.kasmina import Kasmina, Seed
from esper.workers.kasmina.registry import Blueprint, Natural
from esper.workers.kasmina.slices import Slice
from esper.workers.tolaria import compiled
from esper.workers.tolaria.data import Data
from esper.workers.tolaria.data.prepared import evenly
from esper.workers.tolaria.gpt2 import from_gpt2
from esper.workers.tolaria.hosts import AnyHost, new_host, rebuilt
from esper.workers.tolaria.model.layered import Layout

EVAL_POSITIONS_AT_ONCE = {"cpu": 4096, "cuda": 16384}  # activations fit a core's cache; a GPU wants large parts
PROOF_POSITIONS = 1024  # of held-out data, on which logits are compared before and after a graft
CONTRIBUTION_BATCHES = 2  # training batches' worth of held-out data that contributions are measured on


class TrainerState(Frozen):
    """A trainer's state without its tensors."""

    layout: Layout
    seeds: tuple[Seed, ...]
    grafts: Natural
    steps: Natural


Snapshot = tuple[TrainerState, dict[str, Tensor]]  # never changed once taken


class Trainer:
    """Trains one `host` by its `optimizer`; `kasmina` grows both."""

    def __init__(
        self, spec: RunSpec, data: Data, blueprints: dict[str, Blueprint], seed: int, instance: Instance
    ) -> None:
        self.device = pick_device(spec)
        compiled.check(spec)
        torch.set_num_threads(spec.threads)
        self._spec, self._blueprints, self._seed = spec, blueprints, seed
        self._born, self._vocab_size = spec.host.starting_with(instance.n_layer), data.manifest.vocab_size
        self.batches = data.batches(spec, seed, instance.data, self.device)
        whole, at_decisions = (tokens // spec.host.tokens for tokens in spec.data.held_out_tokens)
        self._held_out = data.held_out(whole, spec, self.device)
        part = evenly(at_decisions, len(self._held_out[0]))
        self._part = self._held_out[0][part], self._held_out[1][part]  # of it, for decisions
        self._sample = data.held_out(CONTRIBUTION_BATCHES * spec.data.batch_size, spec, self.device)
        self.sample_tokens = self._sample[1].numel()  # tokens that contributions are measured on
        self.take(new_host(self._born, self._vocab_size, torch_stream(seed, "init")))
        self.steps = 0  # optimizer steps done: the data's cursor
        self.accuracy: float | None = None  # in the last evaluation; None where the data are not told by it
        self._measured: list[Tensor] = []

    def start_with(self, weights: Path) -> None:
        """Train the GPT-2 of this `model.safetensors`, of the shape of the spec's host, instead of a new host."""
        host = from_gpt2(weights.parent)
        self.take(rebuilt(self._born, self._vocab_size, host.layout(), host.own_state()))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bound": None}  # its tensors are not a copy's

    def take(self, host: AnyHost) -> None:
        """Train this host from now on, with a new optimizer: AdamW, weight decay on matrices (1711.05101)."""
        self.host, spec = host.to(self.device), self._spec.optimizer
        matrices = [parameter for parameter in self.host.parameters() if parameter.dim() >= 2]
        others = {"params": [p for p in self.host.parameters() if p.dim() < 2], "weight_decay": 0.0}
        groups = [{"params": matrices, "weight_decay": spec.weight_decay}, others]
        self.optimizer = EagerAdamW(groups, spec.learning_rate, spec.betas, spec.eps, fused=True)
        self.kasmina = Kasmina(
            self.host,
            self.optimizer,
            blueprints=self._blueprints,
            probation_steps=self._spec.growth.probation_steps,
            seed=self._seed,
        )
        self._bound: tuple[compiled.CompiledStep, tuple[int, int]] | None = None  # with what was grown by then

    def package(self) -> compiled.Package | None:
        """That of the host's compiled step; None where it has to go eagerly: young seeds, experts and the like."""
        unfit = compiled.unfit(self._spec, self.host.shape.experts(), self.device.type) or self.kasmina.slowed()
        return None if unfit else compiled.Package(self._spec, self.host, self.device.type)

    def bind(self, package: compiled.Package) -> None:
        """Take steps by a package, if it is there and can be loaded, until the host is changed or copied."""
        if package.there and (loader := package.loader()) is not None:
            self._bound = compiled.CompiledStep(loader, self.host, self.optimizer), self._grown

    @property
    def bound(self) -> bool:
        return self._bound is not None and self._bound[1] == self._grown

    @property
    def _grown(self) -> tuple[int, int]:
        return self.kasmina.grafts, len(self.kasmina.seeds)

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._bound is not None and self.bound:
            self.optimizer.zero_grad(set_to_none=True)
            loss, norm = self._bound[0](*self.batches.at(self.steps), rate)
            for seed in self.kasmina.seeds:
                seed.age += 1
            self._measured.append(torch.stack((loss, norm, norm)))
        else:
            self._bound = None
            self._measured.append(self._eager_step())
        self.steps += 1

    def _eager_step(self) -> Tensor:
        """Returns a row of `measured`, (3,)."""
        if self._spec.host.dropout > 0:
            key = derive(self._seed, "dropout", self.steps)  # `torch.manual_seed` formats a stack trace at each call
            (torch.cuda.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed)(key)
        inputs, targets = self.batches.at(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(inputs, targets)
        loss.backward()
        norm, seeds = self.kasmina.step(self._spec.optimizer.grad_clip)
        return torch.stack((loss.detach(), norm, norm if seeds is None else norm + seeds))

    def evaluate(self, between: Callable[[], None] = lambda: None, *, whole: bool = False) -> float:
        """Mean loss, nats per token, on the held-out set or its part for decisions; sets `accuracy`."""
        loss, self.accuracy = self._mean_loss(*(self._held_out if whole else self._part), between)
        return loss

    @torch.no_grad()
    def logits(self) -> Tensor:
        """On a small held-out batch, float32 (B, …, V) on the CPU."""
        self.host.eval()
        logits = self._logits(self._held_out[0][: max(1, PROOF_POSITIONS // self._spec.host.positions)])
        self.host.train()
        return logits.cpu()

    @torch.no_grad()
    def contributions(self, sites: Iterable[str], between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Site → loss with its newest seed masked minus loss with it, nats per token, on a small held-out sample."""
        whole, _ = self._mean_loss(*self._sample, between)
        without = {}
        for site in sites:
            with self.kasmina.masked(site):
                without[site] = self._mean_loss(*self._sample, between)[0] - whole
        return without

    def measured(self, since: int = 0) -> list[list[float]]:
        """Per step since the last `forget`, from index `since` on: [loss, norm, norm of all].

        Loss in nats per token; the host's gradient norm before clipping, without and with seeds on probation.
        """
        rows = self._measured[since:]
        return torch.stack(rows).tolist() if rows else []

    @property
    def unread(self) -> int:
        return len(self._measured)

    def forget(self) -> None:
        self._measured = []

    def site_norms(self) -> dict[str, tuple[float, float]]:
        """Site id → norms of the clipped gradient and AdamW's last update over the weights' norm, where finite."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        slowed = self.kasmina.slowed()
        squares = self._gradient_squares()
        rows = {}
        for site in self.host.shape.injection_specs():
            if parameters := [p for p in self.host.written_by(site.id) if id(p) in squares]:
                weights = _norm(p.detach() for p in parameters)
                gradients = torch.stack([squares[id(p)] for p in parameters]).sum().sqrt()
                updates = _norm(_update(self.optimizer.state[p], p, groups[id(p)], slowed) for p in parameters)
                rows[site.id] = torch.stack([weights, gradients, updates])
        values = torch.stack(list(rows.values())).tolist() if rows else []  # one wait for the device
        return {
            site: (gradient / max(weight, 1e-12), update / max(weight, 1e-12))
            for site, (weight, gradient, update) in zip(rows, values, strict=True)
            if math.isfinite(weight + gradient + update)
        }

    def _gradient_squares(self) -> dict[int, Tensor]:
        """Parameter's id → sum of squares of its clipped gradient in the last step."""
        if self._bound is not None and self._bound[0].squares is not None:
            return dict(zip(map(id, self._bound[0].parameters), self._bound[0].squares.unbind(), strict=True))
        gradients = {id(parameter): parameter.grad for parameter in self.host.parameters()}
        return {key: grad.float().square().sum() for key, grad in gradients.items() if grad is not None}

    def state(self) -> Snapshot:
        """A copy on the CPU, from which `load` continues with the same numbers."""
        names = {id(parameter): name for name, parameter in self.host.named_parameters()}
        tensors = {f"host/{name}": tensor for name, tensor in self.host.own_state().items()}
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[id(parameter)]}/{key}": value for key, value in moments.items()}
        tensors["measured"] = torch.stack(self._measured) if self._measured else torch.zeros(0, 3)
        layout, seeds = self.host.layout(), tuple(map(replace, self.kasmina.seeds))
        values = TrainerState(layout=layout, seeds=seeds, grafts=self.kasmina.grafts, steps=self.steps)
        return values, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def load(self, state: TrainerState, tensors: Mapping[str, Tensor]) -> None:
        """Restore a state, copying its tensors; all kinds of errors where the two do not fit together."""
        own = {name: tensor.to(torch.float32, copy=True) for name, tensor in within("host/", tensors).items()}
        host = rebuilt(self._born, self._vocab_size, state.layout, own)
        self.take(host)
        named, moments = dict(self.host.named_parameters()), self.optimizer.state
        for name, tensor in within("optimizer/", tensors).items():
            owner, _, key = name.rpartition("/")
            moments[named[owner]][key] = tensor.to(self.device, copy=True)
        rows = tensors["measured"]
        if rows.shape[1:] != (3,) or not all(_fit(parameter, kept) for parameter, kept in moments.items()):
            raise ValueError("the optimizer's tensors have other shapes")
        self.kasmina.load(state.seeds, state.grafts)
        self.steps = state.steps
        self._measured = list(rows.to(self.device, copy=True).unbind())

    def roll_back(self, good: Snapshot) -> None:
        """Load a snapshot of this run but keep the counters of layers and grafts: no id is used twice."""
        next_uid, grafts = self.host.layout().next_uid, self.kasmina.grafts
        self.load(*good)
        self.host.reserve(next_uid)
        self.kasmina.grafts = grafts

    @torch.no_grad()
    def _mean_loss(self, inputs: Tensor, targets: Tensor, between: Callable[[], None]) -> tuple[float, float | None]:
        """In nats, and the share of targets foretold, where the data are told by that."""
        at_once = max(1, EVAL_POSITIONS_AT_ONCE[self.device.type] // self._spec.host.positions)
        total, right = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in zip(inputs.split(at_once), targets.split(at_once), strict=True):
            self.host.eval()
            logits = self._logits(part[0]).flatten(0, -2)
            total += F.cross_entropy(logits, part[1].flatten()).double() * part[1].numel()
            right += (logits.argmax(-1) == part[1].flatten()).sum() if self._spec.data.classifies else 0
            self.host.train()
            between()
        accuracy = right.item() / targets.numel() if self._spec.data.classifies else None
        return total.item() / targets.numel(), accuracy

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(inputs).flatten(0, -2), targets.flatten())

    def _logits(self, inputs: Tensor) -> Tensor:
        if self._spec.dtype != "bfloat16":  # a context that does nothing costs a small step 1 %
            return self.host(inputs)  # (B, …, V)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return self.host(inputs).float()


def within(folder: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `folder`, with that prefix removed from their names."""
    return {name.removeprefix(folder): tensor for name, tensor in tensors.items() if name.startswith(folder)}


def _fit(parameter: Tensor, moments: Mapping[str, Tensor]) -> bool:
    """Whether these may be AdamW's state of a parameter."""
    shapes = {key: tensor.shape for key, tensor in moments.items()}
    fitting = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    return shapes == fitting and bool(moments["step"] >= 1)


def _update(state: dict, parameter: Tensor, group: dict, slowed: Iterable[tuple[Slice, float]]) -> Tensor:
    """AdamW's last update of a parameter without weight decay, times the learning rate (1711.05101, algorithm 2)."""
    if not state:
        return torch.zeros_like(parameter)
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    first = state["exp_avg"] / (1 - beta1**step)
    second = state["exp_avg_sq"] / (1 - beta2**step)
    update = group["lr"] * first / (second.sqrt() + group["eps"])
    for each, weight in slowed:
        if each.parameter is parameter:
            each.of(update).mul_(weight)
    return update


def _norm(tensors: Iterator[Tensor]) -> Tensor:
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum().sqrt()


def pick_device(spec: RunSpec) -> torch.device:
    """The spec's device; `auto` prefers a GPU. UserError where CUDA is asked for but absent."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but this machine shows no CUDA GPU: use --set device=cpu or device=auto.")
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(spec.device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
