"""Optimizer surgery: what happens to a torch optimizer's groups and state when its model's parameters change.

A new parameter starts with no state (zero moments, a step count of its own) in a group of its own, with the settings of
the group that its sibling is in. A parameter that is joined to another takes its state along; one that is cut keeps the
state of what is left. Nothing else is touched, to the bit.

Adam divides its running means by 1 − βᵗ (Kingma & Ba 2015, 1412.6980, section 3), and torch keeps one t a tensor. A
young part of age t that is joined to a tensor of age T is therefore rescaled by (1 − βᵀ)/(1 − βᵗ): its corrected
moments are then the same right after, and its next updates differ only by the weight of its first gradients, which β₂ᵗ
bounds.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.platform.contracts import Swap
from esper.platform.errors import UserError

Group = dict[str, Any]

CORRECTED = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
"""Running means that Adam corrects → index of their β."""


def check_owns(optimizer: Optimizer, parameters: Iterable[Any]) -> None:
    """Refuse an optimizer that does not hold exactly these parameters, once each.

    Raises:
        UserError: it holds another, or one twice, or lacks one.
    """
    owned = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if len(owned) != len(set(owned)) or set(owned) != {id(parameter) for parameter in parameters}:
        raise UserError("the optimizer does not hold exactly the host's parameters: make it from host.parameters().")


def add(optimizer: Optimizer, pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Group, Group]]:
    """A new group for each group that the siblings are in; returns each with the group it follows.

    Args:
        optimizer: changed.
        pairs: (new parameter, its sibling, which the optimizer holds).
    """
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
    """Let `change.new` take the place of `change.old`, with its state, joined or cut like its values."""
    new, old, young = change.new, change.old, change.young
    group = next(group for group in optimizer.param_groups if any(held is old for held in group["params"]))
    group["params"] = [new if held is old else held for held in group["params"]]
    state = optimizer.state.pop(old, {})
    other = None
    if young is not None:
        other = optimizer.state.pop(young, {})
        drop(optimizer, [young])
    if state or other:
        optimizer.state[new] = {
            key: _joined(key, value, state, other, group, change) for key, value in (state or other or {}).items()
        }
    new.grad = _like(old.grad, None if young is None else young.grad, change)


def drop(optimizer: Optimizer, parameters: Iterable[Any]) -> None:
    """Forget parameters, and the groups that are empty without them."""
    gone = {id(parameter): optimizer.state.pop(parameter, None) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def move(optimizer: Optimizer, source: Group, target: Group) -> None:
    """Move every parameter of a group into another, state and all; the emptied group is gone."""
    target["params"] += source["params"]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group is not source]


def _joined(key: str, value: Any, state: dict, other: dict | None, group: Group, change: Swap) -> Any:
    """One entry of the state of `change.new`."""
    if not isinstance(value, Tensor) or value.dim() == 0:  # a step count: the old one's
        return value
    if change.young is None:
        return _like(state.get(key), None, change)
    old = state[key] if state else torch.zeros_like(change.old)
    young = other[key] if other else torch.zeros_like(change.young)
    if key in CORRECTED and state and other:
        beta = group["betas"][CORRECTED[key]]
        young = young * ((1 - beta ** float(state["step"])) / (1 - beta ** float(other["step"])))
    return _like(old, young, change)


def _like(old: Tensor | None, young: Tensor | None, change: Swap) -> Tensor | None:
    """A tensor joined or cut as the parameter's values were."""
    if old is None or (change.young is not None and young is None):
        return None
    if young is None:
        return old.narrow(change.axis, 0, change.new.shape[change.axis]).clone()
    return torch.cat([old, young], change.axis)
