"""What blueprints share: units (heads, neurons) between two linear layers, and parts, put in and taken out whole.

A unit is rows of the incoming layer and columns of the outgoing one:

    y = V·φ(U·x)   →   y' = [V 0]·φ([U; U⁺]·x) = V·φ(U·x) + 0·φ(U⁺·x) = y

for any φ that acts on each unit alone (GELU, attention heads). Only the outgoing side is zero: zero on both would
leave both without a gradient (Net2Net 1511.05641; GradMax 2201.05125).
"""

from typing import Any

import torch
from torch import Tensor, nn

from esper.platform.contracts import HostProtocol, HostShape, Resized
from esper.workers.kasmina import surgery
from esper.workers.kasmina.registry import Blueprint, Grafted, Planted
from esper.workers.kasmina.slices import Slice


def drawn_like(sibling: Tensor, size: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values with the root mean square of `sibling`, on the CPU."""
    return torch.randn(size, generator=generator) * sibling.detach().float().square().mean().sqrt().cpu()


class Units(Blueprint):
    """What every blueprint of units shares."""

    limit: int

    def allowed(self, shape: HostShape, site_id: str) -> bool:
        return _units_at(shape, site_id) + self.units <= self.limit

    def resized(self, shape: Any, site_id: str) -> HostShape:
        return shape.with_units(site_id, self.units)

    def pruned(self, shape: Any, seed: Planted) -> HostShape:
        return shape.with_units(seed.site, -seed.units)

    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> Grafted:
        """Add rows at the scale of the site's own, so that activations match, and zero columns."""
        weight, grown = host.linears(site_id)[0].weight, _grown(host, site_id)
        rows = drawn_like(weight[0], (self.units * grown[0][3], *weight.shape[1:]), generator)
        values = (rows, None, None)
        changes = [_resized(*part[:3], self.units * part[3], value) for part, value in zip(grown, values, strict=True)]
        return "", changes, []

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        columns = self.slices(host, seed, newer=0)[2]
        return [columns.of(columns.parameter)]

    def slices(self, host: HostProtocol, seed: Planted, newer: int) -> list[Slice]:
        """Of the incoming weight and bias, and of the outgoing weight."""
        start = _units_at(host.shape, seed.site) - newer - seed.units
        return [
            Slice(getattr(module, name), axis, start * each, seed.units * each)
            for module, name, axis, each in _grown(host, seed.site)
        ]

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Resized], list[Any]]:
        return [_resized(*part[:3], -seed.units * part[3]) for part in _grown(host, seed.site)], []


class Part(Blueprint):
    """What every blueprint of a part shares."""

    units = 0

    def pruned(self, shape: HostShape, seed: Planted) -> HostShape:
        return shape.without(seed.part)

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        return host.part(seed.part).outgoing()

    def slices(self, host: HostProtocol, seed: Planted, newer: int) -> list[Slice]:
        """All of the part's parameters."""
        return [Slice(parameter) for parameter in host.part(seed.part).parameters()]

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Resized], list[Any]]:
        return [], host.remove(seed.part)


def _units_at(shape: HostShape, site_id: str) -> int:
    return next(site.units for site in shape.injection_specs() if site.id == site_id)


def _grown(host: HostProtocol, site_id: str) -> list[tuple[Any, str, int, int]]:
    """What units are parts of: (module, name of the parameter, axis, size along it per unit)."""
    (incoming, outgoing), units = host.linears(site_id), _units_at(host.shape, site_id)
    parts = ((incoming, "weight", 0), (incoming, "bias", 0), (outgoing, "weight", 1))
    return [(module, name, axis, getattr(module, name).shape[axis] // units) for module, name, axis in parts]


@torch.no_grad()
def _resized(module: Any, name: str, axis: int, more: int, values: Tensor | None = None) -> Resized:
    """Lengthen a module's parameter along an axis by `values` (zeros without), or shorten it by −`more`."""
    old = getattr(module, name)
    new = nn.Parameter(surgery.fitted(old.detach(), old.shape[axis] + more, axis), requires_grad=old.requires_grad)
    if values is not None:
        new.narrow(axis, old.shape[axis], more).copy_(values)
    setattr(module, name, new)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    return Resized(new, old, axis)
