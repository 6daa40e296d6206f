"""What blueprints share: units (heads, neurons, channels) between two linear maps, and parts, put in and taken out.

A unit is rows of the incoming map and columns of the outgoing one, matrices or convolutions:

    y = V·φ(U·x)   →   y' = [V 0]·φ([U; U⁺]·x) = V·φ(U·x) + 0·φ(U⁺·x) = y

for any φ that acts on each unit alone (GELU, attention heads, a norm of whole groups of channels). Only the outgoing
side is zero: zero on both would leave both without a gradient (Net2Net 1511.05641; GradMax 2201.05125).
"""

import math
from collections.abc import Sequence
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
        """Add rows at the scale of the site's own, so that activations match, zero columns, and norms as at birth."""
        (incoming, *_), grown = host.linears(site_id), _grown(host, site_id)
        weight = incoming.weight
        rows = drawn_like(weight[0], (self.units * grown[0][3], *weight.shape[1:]), generator)
        values = [rows if part[0] is incoming and part[1] == "weight" else None for part in grown]
        return "", _lengthened(grown, self.units, values), []

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        columns = self.slices(host, seed, newer=0)[-1]
        return [columns.of(columns.parameter)]

    def slices(self, host: HostProtocol, seed: Planted, newer: int) -> list[Slice]:
        """Of the incoming weight and bias, what lies between, and the outgoing weight."""
        start = _units_at(host.shape, seed.site) - newer - seed.units
        return [
            Slice(value, axis, start * each, seed.units * each)
            for module, name, axis, each in _grown(host, seed.site)
            if isinstance(value := getattr(module, name), nn.Parameter)
        ]

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Resized], list[Any]]:
        return _lengthened(_grown(host, seed.site), -seed.units), []


class Part(Blueprint):
    """What every blueprint of a part shares."""

    units = 0

    def pruned(self, shape: HostShape, seed: Planted) -> HostShape:
        return shape.without(seed.part)

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        return host.part(seed.part).outgoing()

    def slices(self, host: HostProtocol, seed: Planted, newer: int) -> list[Slice]:
        return [Slice(parameter) for parameter in host.part(seed.part).parameters()]

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Resized], list[Any]]:
        return [], host.remove(seed.part)


class Layer(Part):
    """What every blueprint of a whole layer in a residual stream shares; the spec's `growth.max_layers` bounds them."""

    def patience(self, host: HostProtocol, site_id: str) -> int:
        """The largest stream size over the one here, at most 4: an update weighs that much more in a small stream.

        Root mean squares: 0.3 after the embeddings, 13 after the first layer (tinystories-char, 600 steps).
        """
        sizes = host.stream_sizes()
        return min(4, math.ceil(max(sizes.values()) / max(sizes[site_id], 1e-12)))

    def allowed(self, shape: HostShape, site_id: str) -> bool:
        return True  # the run caps layers

    def resized(self, shape: Any, site_id: str) -> HostShape:
        return shape.with_layer(site_id)

    @torch.no_grad()
    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> Grafted:
        """Zero the outgoing side; norms and biases are as at birth, what else there is as `drawn` says."""
        name, pairs = host.insert(site_id, self.resized(host.shape, site_id))
        layer = host.part(name)
        siblings = {id(new): sibling for new, sibling in pairs}
        outgoing = {id(parameter) for parameter in layer.outgoing()}
        for key, parameter in layer.named_parameters():
            if id(parameter) in outgoing:
                parameter.zero_()
            else:
                parameter.copy_(self.drawn(key, parameter, siblings[id(parameter)].detach(), generator))
        return name, [], pairs

    def drawn(self, key: str, new: Tensor, sibling: Tensor, generator: torch.Generator) -> Tensor:
        """The value of a parameter of the incoming side: at its sibling's scale; norms 1, biases 0."""
        if new.dim() > 1:
            return drawn_like(sibling, new.shape, generator)
        return torch.zeros_like(new) if key.endswith("bias") else torch.ones_like(new)


def _units_at(shape: HostShape, site_id: str) -> int:
    return next(site.units for site in shape.injection_specs() if site.id == site_id)


def _grown(host: HostProtocol, site_id: str) -> list[tuple[Any, str, int, int]]:
    """What units are parts of: (module, name of the parameter or buffer, axis, size along it per unit)."""
    (incoming, *between, outgoing), units = host.linears(site_id), _units_at(host.shape, site_id)
    parts = [(incoming, "weight", 0), (incoming, "bias", 0)]
    parts += [(module, name, 0) for module in between for name in ("weight", "bias", "running_mean", "running_var")]
    there = [part for part in [*parts, (outgoing, "weight", 1)] if getattr(part[0], part[1], None) is not None]
    return [(module, name, axis, getattr(module, name).shape[axis] // units) for module, name, axis in there]


@torch.no_grad()
def _lengthened(
    grown: list[tuple[Any, str, int, int]], units: int, values: Sequence[Tensor | None] | None = None
) -> list[Resized]:
    """Lengthen each of `_grown` by so many units, with `values` where there are, or shorten it by −`units`."""
    changes = []
    for (module, name, axis, each), value in zip(grown, values or [None] * len(grown), strict=True):
        old, more = getattr(module, name), units * each
        new = surgery.fitted(old.detach(), old.shape[axis] + more, axis)
        if more > 0:
            of_norm = name == "running_var" or (name == "weight" and old.dim() == 1)
            added = new.narrow(axis, old.shape[axis], more)
            added.fill_(float(of_norm)) if value is None else added.copy_(value)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            changes.append(Resized(new, old, axis))
        setattr(module, name, new)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
    return changes
