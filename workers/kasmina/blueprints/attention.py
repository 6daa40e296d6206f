"""AttentionSeed: more heads in a layer (widthwise growth of attention; MSG 2305.02869, 2308.06103 theorem on heads).

    attn(x) = Σ_h O_h·head_h(x)   →   Σ_h O_h·head_h(x) + 0·head_new(x)

A head is 3·D rows of QKV (a (3, D) group in the (H, 3, D, C) layout) and D output columns, zero at birth.
Parameters per head: 3·D·(C + 1) + C·D. Training FLOPs per token and head: 3·(8·C·D + 4·T·D).
"""

from dataclasses import dataclass
from typing import ClassVar

from esper.platform.contracts import SiteKind
from esper.workers.kasmina.blueprints.units import Units
from esper.workers.kasmina.registry import Count, register


@register
@dataclass(frozen=True)
class AttentionSeed(Units):
    """`heads` heads at a time, up to `limit` in a layer."""

    name: ClassVar[str] = "attention"
    site_kind: ClassVar[SiteKind] = "pre_attention"
    adds: ClassVar[str] = "heads"

    heads: Count = 1  # of a graft
    limit: Count = 64  # heads of a layer

    @property
    def units(self) -> int:
        return self.heads
