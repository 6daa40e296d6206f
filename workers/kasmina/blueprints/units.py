"""What blueprints share: units (heads, neurons) between two linear layers, and parts, put in and taken out whole.

A unit is rows of the incoming layer and columns of the outgoing one:

    y = V·φ(U·x)   →   y' = [V 0]·φ([U; U⁺]·x) = V·φ(U·x) + 0·φ(U⁺·x) = y

for any φ that acts on each unit alone (GELU, attention heads). Only the outgoing side is zero: zero on both would
leave both without a gradient (Net2Net 1511.05641; GradMax 2201.05125).
"""

from typing import Any

import torch
from torch import Tensor

from esper.platform.contracts import HostProtocol, HostShape, Swap
from esper.workers.kasmina.registry import Blueprint, Planted


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

    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> tuple[str, list[tuple]]:
        """Add rows at the scale of the site's own, so that activations match, and zero columns."""
        incoming, outgoing = host.linears(site_id)
        rows, columns = _per_unit(host, site_id)
        weight = drawn_like(incoming.weight[0], (self.units * rows, incoming.in_features), generator)
        zeros = torch.zeros(outgoing.out_features, self.units * columns)
        return "", incoming.add(weight, torch.zeros(self.units * rows)) + outgoing.add(zeros)

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        _, columns = _per_unit(host, seed.site)
        return [host.linears(seed.site)[1].tail(seed.units * columns)]

    def fuse(self, host: HostProtocol, seed: Planted) -> list[Swap]:
        return [change for linear in host.linears(seed.site) for change in linear.fuse()]

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Swap], list[Any]]:
        swaps, gone = [], []
        for linear, size in zip(host.linears(seed.site), _per_unit(host, seed.site), strict=True):
            changed, lost = linear.cut(seed.units * size)
            swaps += changed
            gone += lost
        return swaps, gone


class Part(Blueprint):
    """What every blueprint of a part shares."""

    units = 0

    def pruned(self, shape: HostShape, seed: Planted) -> HostShape:
        return shape.without(seed.part)

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        return host.part(seed.part).outgoing()

    def fuse(self, host: HostProtocol, seed: Planted) -> list[Swap]:
        return []

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Swap], list[Any]]:
        return [], host.remove(seed.part)


def _units_at(shape: HostShape, site_id: str) -> int:
    return next(site.units for site in shape.injection_specs() if site.id == site_id)


def _per_unit(host: HostProtocol, site_id: str) -> tuple[int, int]:
    """Rows of the incoming and columns of the outgoing matrix per unit."""
    (incoming, outgoing), units = host.linears(site_id), _units_at(host.shape, site_id)
    return incoming.out_features // units, outgoing.in_features // units
