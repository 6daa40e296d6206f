"""FFNSeed: more neurons in a layer's MLP (widthwise growth; Net2WiderNet 1511.05641, GradMax 2201.05125).

    mlp(x) = P·gelu(F·x + f) + p   →   [P 0]·gelu([F; F⁺]·x + [f; 0]) + p = mlp(x)

A neuron is a row of `c_fc` and a column of `c_proj`. The column is zero at birth; the row is not. Parameters per
neuron: 2·C + 1. Training FLOPs per token and neuron: 3·4·C.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from esper.platform.contracts import HostProtocol, HostShape, SiteKind
from esper.workers.kasmina.blueprints.widen import add_units, units_at
from esper.workers.kasmina.registry import register


@register
@dataclass(frozen=True)
class FFNSeed:
    """`width` neurons at a time, up to `limit` in a layer."""

    name: ClassVar[str] = "ffn"
    site_kind: ClassVar[SiteKind] = "post_ffn"
    adds: ClassVar[str] = "width"

    width: int = 64
    limit: int = 65536

    def allowed(self, shape: HostShape, site_id: str) -> bool:
        """Up to `limit` neurons in all."""
        return units_at(shape, site_id) + self.width <= self.limit

    def resized(self, shape: Any, site_id: str) -> HostShape:
        """The shape with the neurons added."""
        return shape.with_width(site_id, self.width)

    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> list[tuple]:
        """Add the neurons to the host's own matrices."""
        return add_units(host, site_id, self.width, generator)
