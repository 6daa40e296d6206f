"""The processes that train one model under torch's DistributedDataParallel (DDP); without it, this process alone."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.platform.errors import UserError

T = TypeVar("T")

KEPT = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view")


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
