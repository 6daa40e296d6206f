"""FFNSeed: more neurons in a layer's MLP (widthwise growth; Net2WiderNet 1511.05641, GradMax 2201.05125).

    mlp(x) = P·gelu(F·x + f) + p   →   [P 0]·gelu([F; F⁺]·x + [f; 0]) + p = mlp(x)

A neuron is a row of `c_fc` and a column of `c_proj`, zero at birth: 2·C + 1 parameters, 3·4·C training FLOPs per token.
"""

from dataclasses import dataclass
from typing import ClassVar

from esper.platform.contracts import SiteKind
from esper.workers.kasmina.blueprints.units import Units
from esper.workers.kasmina.registry import Count, register


@register
@dataclass(frozen=True)
class FFNSeed(Units):
    """`width` neurons at a time, up to `limit` in a layer."""

    name: ClassVar[str] = "ffn"
    site_kind: ClassVar[SiteKind] = "post_ffn"
    adds: ClassVar[str] = "width"

    width: Count = 64  # neurons of a graft
    limit: Count = 65536  # neurons of a layer

    @property
    def units(self) -> int:
        return self.width
