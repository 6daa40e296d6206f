"""Optimizer surgery: groups and state follow a model's parameters, to the bit; what is new starts with none."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.platform.contracts import Resized
from esper.platform.errors import UserError


@torch.no_grad()
def resize(optimizer: Optimizer, change: Resized) -> None:
    """Let `change.new` take the place of `change.old`; its state and gradient are padded with zeros, or cut."""
    old, new, axis = change.old, change.new, change.axis

    def follow(value: Any) -> Any:
        alike = isinstance(value, Tensor) and value.shape == old.shape  # not a step count
        return fitted(value, new.shape[axis], axis) if alike else value

    for group in optimizer.param_groups:
        group["params"] = [new if held is old else held for held in group["params"]]
    if state := optimizer.state.pop(old, None):
        optimizer.state[new] = {key: follow(value) for key, value in state.items()}
    new.grad = follow(old.grad)


def check_owned(optimizer: Optimizer, host: Any) -> None:
    """Raise UserError unless the optimizer holds exactly the host's parameters."""
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    own = {id(parameter) for parameter in host.parameters()}
    lacking, others = len(own - {*held}), len({*held} - own)
    if lacking or others:
        what = f"the optimizer lacks {lacking} of the model's {len(own)} tensors and holds {others} others"
        raise UserError(f"{what}: make it from model.parameters(), all of them and no more.")


def check(optimizer: Optimizer) -> None:
    """Raise UserError where a state has tensors, but for step counts, of other shapes than their parameter's."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                what = f"{type(optimizer).__name__} cannot follow a graft: its {key!r} has not its parameter's shape"
                raise UserError(f"{what}: take an optimizer whose state is per weight, as AdamW's is.")


def add(optimizer: Optimizer, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Add each new parameter, of (new, sibling), to its sibling's group."""
    home = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for new, sibling in pairs:
        home[id(sibling)]["params"].append(new)


def drop(optimizer: Optimizer, parameters: Iterable[Any]) -> None:
    """Remove parameters and their state."""
    gone = {id(parameter): optimizer.state.pop(parameter, None) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]


def fitted(value: Tensor, size: int, axis: int) -> Tensor:
    """A copy padded with zeros, or cut, to `size` along `axis`."""
    more = size - value.shape[axis]
    if more <= 0:
        return value.narrow(axis, 0, size).clone()
    return torch.cat([value, value.new_zeros([more if i == axis else n for i, n in enumerate(value.shape)])], axis)
