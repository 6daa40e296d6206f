"""OwnLoop: an episode whose optimizer steps come from a loop that is not ours; pipelines/common/grow.py is its face.

Data and learning rate are the loop's, so a rollback returns weights and optimizer only, and there are no copies to try
grafts on. Telemetry leaves out what is measured on them or on AdamW's moments: contributions and norms of sites.
`Ranks` are the processes that train one model under torch's DistributedDataParallel (DDP), or this one alone.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.platform.console import say
from esper.platform.contracts import GraftAction, HostShape
from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate
from esper.workers.kasmina import Kasmina, Seed
from esper.workers.kasmina.governor import CHECK_EVERY
from esper.workers.observe import Observer, batch_tokens
from esper.workers.trained import STRIKES, TrainedEpisode, TrainedState

T = TypeVar("T")
Changed = tuple[Literal["graft", "prune"], str, str]  # a site and, of a graft, its blueprint

KEPT = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view")
NO_COPIES = (
    "grafts cannot be tried on copies where the batches are the loop's own: take another controller than lag, or "
    "`esper train lag`."
)


class Ranks:
    """What `model` is of, a host or DDP around one; UserError where DDP could not be wrapped anew as it is."""

    def __init__(self, model: nn.Module) -> None:
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        inner = model if self._ddp is None else self._ddp.module
        self.host: Any = getattr(inner, "_orig_mod", inner)  # of what torch.compile made
        if self._ddp is None and isinstance(getattr(model, "module", None), nn.Module):
            what = f"{type(model).__name__} around a model cannot follow a graft"
            raise UserError(f"{what}: wrap it in DistributedDataParallel, or in nothing.")
        if self._ddp is not None and (self._ddp.mixed_precision is not None or self._ddp._comm_hooks):
            what = (
                "DistributedDataParallel with mixed_precision or a communication hook cannot follow a host that grows"
            )
            raise UserError(f"{what}: wrap the model without (torch.autocast works).")

    @property
    def count(self) -> int:
        return 1 if self._ddp is None else dist.get_world_size(self._ddp.process_group)

    @property
    def speaks(self) -> bool:  # whether this is rank 0
        return self._ddp is None or dist.get_rank(self._ddp.process_group) == 0

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; so is an exception there. The others call nothing."""
        if self._ddp is None:
            return make()
        told: list[Any] = [None]
        if self.speaks:
            try:
                told = [make()]
            except Exception as error:
                told = [error]
        group = self._ddp.process_group
        dist.broadcast_object_list(told, group_src=0, group=group, device=self._ddp.device)
        if isinstance(told[0], Exception):
            raise told[0]
        return told[0]

    def mean(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self._ddp is not None:
            dist.all_reduce(tensor, group=self._ddp.process_group)
            tensor /= self.count
        return tensor

    def rewrap(self) -> None:
        """Let DDP follow the host's parameters. In place: what the user's names stand for is still the model."""
        ddp = self._ddp
        if ddp is None:
            return
        kept: dict[str, Any] = {name: getattr(ddp, name) for name in KEPT}
        kept |= {} if ddp.broadcast_buffers else {"broadcast_buffers": False}
        training, static = ddp.training, ddp.static_graph
        del ddp.reducer, ddp.logger  # and so its hooks on the parameters
        DistributedDataParallel.__init__(ddp, self.host, static_graph=static, **kept)
        ddp.training = training


class Loop:
    """A user's loop as what trains a host: it makes the steps, of which this keeps the numbers."""

    def __init__(self, kasmina: Kasmina, ranks: Ranks) -> None:
        self.kasmina, self._ranks = kasmina, ranks
        self.steps: list[tuple[Tensor, ...]] = []  # of this slice, three numbers each

    @property
    def device(self) -> torch.device:
        return next(self._ranks.host.parameters()).device

    def measured(self, since: int = 0) -> list[list[float]]:
        return self._ranks.mean(_rows_of(self.steps[since:])).tolist()

    def forget(self) -> None:
        self.steps.clear()

    def state(self) -> Any:
        """Copies on the CPU of the host's tensors, of each parameter's optimizer state, and of the seeds."""
        host, state = self._ranks.host, self.kasmina.optimizer.state
        tensors = {name: _copied(tensor) for name, tensor in host.state_dict().items()}
        moments = [{key: _copied(value) for key, value in state.get(p, {}).items()} for p in host.parameters()]
        return tensors, moments, tuple(map(replace, self.kasmina.seeds))

    def roll_back(self, good: Any) -> None:
        tensors, moments, seeds = good
        host, state = self._ranks.host, self.kasmina.optimizer.state
        host.load_state_dict(tensors)
        for parameter, kept in zip(host.parameters(), moments, strict=True):
            now = state.pop(parameter, {})
            if kept:
                state[parameter] = {key: _copied(value, now[key]) for key, value in kept.items()}
        self.kasmina.load(seeds, self.kasmina.grafts)


class LoopState(TrainedState):
    """An OwnLoop's own attributes too."""

    tokens_per_step: int
    history: list[Changed]
    seeds: list[Seed]


class OwnLoop(TrainedEpisode):
    """An episode of `kasmina`'s host, whose steps `push` makes. `evaluate` tells the validation loss, in nats."""

    State = LoopState

    def __init__(
        self,
        spec: RunSpec,
        kasmina: Kasmina,
        ranks: Ranks,
        evaluate: Callable[[], float],
        *,
        vocab_size: int,
        born: HostShape,
        tokens_per_step: int,
        max_norm: float,
    ) -> None:
        super().__init__(spec, vocab_size, born, tokens_per_step)
        self.trainer: Loop = Loop(kasmina, ranks)
        self._ranks, self._loss_now, self._max_norm = ranks, evaluate, max_norm
        self._timed = spec.clock.kind == "wall" and spec.budget.axis in ("seconds", "parameter_seconds")

    def push(self, loss: Tensor, begun: float) -> bool:
        """After backward: clip, step, charge the time since `begun`, look for faults; returns whether a slice ended."""
        optimizer = self.kasmina.optimizer
        if self.kasmina.seeds:
            norm, seeds = self.kasmina.step(self._max_norm)
        else:  # equal to the bit to a loop without Esper
            norm, seeds = nn.utils.clip_grad_norm_(self._ranks.host.parameters(), self._max_norm), None
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps = self.trainer.steps
        steps.append((loss.detach().clone(), norm, norm if seeds is None else norm + seeds))
        self._charge(self.layout.step_seconds, begun, steps=1, wait=False)  # the governor waits at every eighth step
        if self.ended:
            self.trainer.forget()
            return False
        done = self.reading() >= self.clock.boundary
        if not done and len(steps) - self.inspected < CHECK_EVERY:
            return False
        wrong = self._fault(len(steps))
        if wrong is None and done:
            self._reached = self._evaluate()
            wrong = None if math.isfinite(self._reached) else "the validation loss was not finite"
        if wrong is not None:
            self._roll_back(wrong)
            if self.strikes < STRIKES:
                return False
            self.failure = f"{wrong}, {STRIKES} times in a row"
            self._reached = self._evaluate()
        elif done:
            self._note_sound()
            self._sound(self._reached, {})
        else:
            return False
        self.finish()
        return True

    def change(self, action: GraftAction) -> Candidate:
        """Apply the action that begins a slice, and evaluate what it has changed."""
        chosen = self._accept(action)
        self.begin(action)
        if chosen.operation != "wait":
            self._tell_change()
            self._good = self.trainer.state()
        return chosen

    def forecast(self, laws: FittedLaws) -> np.ndarray:
        if batch_tokens(self.spec) != self.tokens_per_step:
            what = f"laws count in whole examples, and a step of this loop has {self.tokens_per_step:,} tokens"
            raise UserError(f"{what}: take batches of the host's whole context, or another controller.")
        return super().forecast(laws)

    def host_rate(self) -> float:
        return max(float(group["lr"]) for group in self.kasmina.optimizer.param_groups)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self.seeds = self.kasmina.seeds
        return super().state()[0], {"steps": _rows_of(self.trainer.steps)}

    def _restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.kasmina.load(self.seeds, len(self.grafts))
        self.trainer.steps = [tuple(row.unbind()) for row in tensors["steps"].to(self.trainer.device)]
        self._good = self.trainer.state()

    def _start(self) -> None:
        self.history: list[Changed] = []  # of the host, by which a new one becomes this one
        self.trainer.forget()
        self._reached = math.inf  # the loss at the end of the slice that is being closed
        super()._start()

    def _change(self, candidate: Candidate) -> None:
        super()._change(candidate)
        if candidate.operation != "wait":
            self.history.append((candidate.operation, candidate.site or "", candidate.blueprint or ""))
            self._ranks.rewrap()

    def _roll_back(self, wrong: str) -> None:
        super()._roll_back(wrong)
        removed = self.rollbacks[-1].removed
        if removed is not None:
            self.history.append(("prune", self.lockout[-1][0], ""))
            self._ranks.rewrap()
        if self._ranks.speaks:
            say(f"rolled back at step {self.ledger.steps:,}: {wrong}{f', {removed} removed' if removed else ''}")

    def _train(self, boundary: float) -> tuple[float, float]:
        """The steps have been pushed."""
        if self._timed:
            self._keep_pace()
        return self._reached, self._reached

    def _keep_pace(self) -> None:
        """Let the formula that foretells what a graft costs take as long for this host as its last steps took."""
        begun = self.curve[-1]
        steps = self.ledger.steps - begun["steps"]
        ratio = (self.ledger.seconds - begun["seconds"]) / (steps * self.layout.step_seconds)
        clock = self.spec.clock
        names = ("base_seconds", "layer_seconds", "expert_seconds")
        scaled = {name: ratio * getattr(clock, name) for name in names}
        scaled["flops_per_second"] = clock.flops_per_second / ratio
        self.spec = self.spec.model_copy(update={"clock": clock.model_copy(update=scaled)})
        self.observer = Observer(self.spec, self._born, self.tokens_per_step)
        self._resized()

    def _evaluate(self) -> float:
        begun = time.perf_counter()
        loss = self._loss_now()
        self.ledger.validation_seconds += time.perf_counter() - begun
        return loss

    def _elapsed(self, begun: float) -> float:
        measured = super()._elapsed(begun)
        return self._ranks.first(lambda: measured) if self._timed else measured

    def _tries(self, actions: Sequence[GraftAction], optimizer_steps: int) -> Iterator[tuple[list[float], Ledger]]:
        raise UserError(NO_COPIES)


def _rows_of(steps: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """float32 (len(steps), 3)."""
    return torch.stack([value.float() for row in steps for value in row]).view(-1, 3) if steps else torch.zeros(0, 3)


def _copied(value: Any, like: Any = None) -> Any:
    """Of a tensor, a copy on the CPU, or on the device of another."""
    device = like.device if isinstance(like, Tensor) else "cpu"
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
