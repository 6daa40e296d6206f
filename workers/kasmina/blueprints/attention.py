"""AttentionSeed: more heads in a layer (widthwise growth of attention; MSG 2305.02869, 2308.06103 theorem on heads).

    attn(x) = Σ_h O_h·head_h(x)   →   Σ_h O_h·head_h(x) + 0·head_new(x)

A head is 3·D rows of QKV (one more (3, D) group in the (H, 3, D, C) layout) and D columns of the output projection.
The columns are zero at birth; the rows are not. Parameters per head: 3·D·(C + 1) + C·D. Training FLOPs per token and
head: 3·(8·C·D + 4·T·D).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from esper.platform.contracts import HostShape, SiteKind
from esper.workers.kasmina.blueprints.widen import Widening
from esper.workers.kasmina.registry import Count, PlantedSeed, register


@register
@dataclass(frozen=True)
class AttentionSeed(Widening):
    """`heads` heads at a time, up to `limit` in a layer."""

    name: ClassVar[str] = "attention"
    site_kind: ClassVar[SiteKind] = "pre_attention"
    adds: ClassVar[str] = "heads"

    heads: Count = 1
    limit: Count = 64

    @property
    def units(self) -> int:
        """Heads."""
        return self.heads

    def resized(self, shape: Any, site_id: str) -> HostShape:
        """The shape with the heads added."""
        return shape.with_heads(site_id, self.heads)

    def pruned(self, shape: Any, seed: PlantedSeed) -> HostShape:
        """The shape without a seed's heads."""
        return shape.with_heads(seed.site, -seed.units)
