"""ConvWidthSeed: more hidden channels in a residual block, both convolutions together (Net2Net 1511.05641; gromo).

    K₂ ∗ relu(norm(K₁ ∗ x))   →   [K₂ 0] ∗ relu(norm([K₁; K₁⁺] ∗ x)) = K₂ ∗ relu(norm(K₁ ∗ x))

A channel is a row of K₁, an entry of the norm between and a column of K₂, zero at birth: 2·9·C + 2 parameters,
3·4·9·C training FLOPs per pixel. GroupNorm's channels come in whole groups, so that no old group's mean changes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from esper.platform.contracts import HostShape, SiteKind
from esper.workers.kasmina.blueprints.units import Units
from esper.workers.kasmina.registry import Count, register


@register
@dataclass(frozen=True)
class ConvWidthSeed(Units):
    """`width` hidden channels at a time, in whole groups of the host's norm; up to `limit` in a block."""

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
