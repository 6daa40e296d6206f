"""Units (heads, neurons, channels) between two linear maps: grown widthwise (Net2Net 1511.05641; GradMax 2201.05125).

A unit is rows of the incoming map and columns of the outgoing one, matrices or convolutions:

    y = V·φ(U·x)   →   y' = [V 0]·φ([U; U⁺]·x) = V·φ(U·x) + 0·φ(U⁺·x) = y

for any φ that acts on each unit alone (GELU, attention heads, a norm of whole groups of channels). Only the outgoing
side is zero: zero on both would leave both without a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esper.platform.contracts import HostProtocol, HostShape, Resized, SiteKind
from esper.workers.kasmina import surgery
from esper.workers.kasmina.registry import Blueprint, Count, Grafted, Planted, register
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


@register
@dataclass(frozen=True)
class AttentionSeed(Units):
    """`heads` heads at a time, up to `limit` in a layer (MSG 2305.02869; 2308.06103, theorem on heads).

    A head is 3·D rows of QKV (a (3, D) group in the (H, 3, D, C) layout) and D output columns.
    Parameters per head: 3·D·(C + 1) + C·D. Training FLOPs per token and head: 3·(8·C·D + 4·T·D).
    """

    name: ClassVar[str] = "attention"
    site_kind: ClassVar[SiteKind] = "pre_attention"
    adds: ClassVar[str] = "heads"

    heads: Count = 1  # of a graft
    limit: Count = 64  # heads of a layer

    @property
    def units(self) -> int:
        return self.heads


@register
@dataclass(frozen=True)
class FFNSeed(Units):
    """`width` neurons at a time, up to `limit` in a layer's MLP.

    A neuron is a row of `c_fc` and a column of `c_proj`: 2·C + 1 parameters, 3·4·C training FLOPs per token.
    """

    name: ClassVar[str] = "ffn"
    site_kind: ClassVar[SiteKind] = "post_ffn"
    adds: ClassVar[str] = "width"

    width: Count = 64  # neurons of a graft
    limit: Count = 65536  # neurons of a layer

    @property
    def units(self) -> int:
        return self.width


@register
@dataclass(frozen=True)
class ConvWidthSeed(Units):
    """`width` hidden channels at a time, in whole groups of the host's norm; up to `limit` in a residual block.

    A channel is a row of K₁, an entry of the norm between and a column of K₂: 2·9·C + 2 parameters, 3·4·9·C training
    FLOPs per pixel. GroupNorm's channels come in whole groups, so that no old group's mean changes.
    """

    name: ClassVar[str] = "conv_width"
    site_kind: ClassVar[SiteKind] = "conv"
    adds: ClassVar[str] = "width"

    width: Count = 8  # channels of a graft
    limit: Count = 4096  # hidden channels of a block

    @property
    def units(self) -> int:
        return self.width

    def resized(self, shape: Any, site_id: str) -> HostShape:
        shape.check_width(self.width, f"growth.blueprints.{self.name}.width")
        return super().resized(shape, site_id)


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
