"""Optimizer surgery: a torch optimizer's groups and state follow changes of the model's parameters.

Adam divides its running means by 1 − βᵗ (Kingma & Ba 2015, 1412.6980, section 3), with one t per tensor. Moments of
age t that join a tensor of age T are rescaled by (1 − βᵀ)/(1 − βᵗ), which keeps the corrected moments; later updates
differ by the weight of the first gradients, at most β₂ᵗ. All other state stays the same to the bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.platform.contracts import Swap

Group = dict[str, Any]

CORRECTED = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}  # Adam's corrected means → index of their β


def add(optimizer: Optimizer, pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Group, Group]]:
    """Add (new parameter, sibling) pairs without state, a new group per sibling's group; returns (new, followed)."""
    home = {id(parameter): i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
    by_group: dict[int, list[Any]] = {}
    for new, sibling in pairs:
        by_group.setdefault(home[id(sibling)], []).append(new)
    added = []
    for index, parameters in by_group.items():
        follows = optimizer.param_groups[index]
        settings = {key: value for key, value in follows.items() if key != "params"}
        optimizer.add_param_group({**settings, "params": parameters})
        added.append((optimizer.param_groups[-1], follows))
    return added


@torch.no_grad()
def swap(optimizer: Optimizer, change: Swap) -> None:
    """Replace `change.old` by `change.new`; state and gradient are joined or cut like the values."""
    new, old, young = change.new, change.old, change.young
    group = next(group for group in optimizer.param_groups if any(held is old for held in group["params"]))
    group["params"] = [new if held is old else held for held in group["params"]]
    state, other = optimizer.state.pop(old, {}), {}
    if young is not None:
        other = optimizer.state.pop(young, {})
        drop(optimizer, [young])
    joined: dict[str, Any] = {}
    for key, value in (state or other).items():
        if not isinstance(value, Tensor) or value.dim() == 0:  # a step count
            joined[key] = value
            continue
        first, second = state.get(key, torch.zeros_like(old)), None
        if young is not None:
            second = other.get(key, torch.zeros_like(young))
        if key in CORRECTED and state and other:
            beta = group["betas"][CORRECTED[key]]
            second = second * ((1 - beta ** float(state["step"])) / (1 - beta ** float(other["step"])))
        joined[key] = _like(first, second, change)
    if joined:
        optimizer.state[new] = joined
    if old.grad is not None and (young is None or young.grad is not None):
        new.grad = _like(old.grad, None if young is None else young.grad, change)


def drop(optimizer: Optimizer, parameters: Iterable[Any]) -> None:
    """Remove parameters, their state, and groups left empty."""
    gone = {id(parameter): optimizer.state.pop(parameter, None) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def move(optimizer: Optimizer, source: Group, target: Group) -> None:
    """Move a group's parameters into another, with their state, and remove the empty group."""
    target["params"] += source["params"]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group is not source]


def _like(old: Tensor, young: Any, change: Swap) -> Tensor:
    if young is None:
        return old.narrow(change.axis, 0, change.new.shape[change.axis]).clone()
    return torch.cat([old, young], change.axis)
