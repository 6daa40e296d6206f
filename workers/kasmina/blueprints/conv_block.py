"""ConvBlockSeed: a residual block in a ResNet's stream (depthwise growth; pre-activation, 1603.05027, figure 4e).

    x → x + K₂ ∗ relu(norm(K₁ ∗ relu(norm(x))))   with K₂ = 0:   x → x + 0 = x

A zero weight of its last norm, which does no harm where a norm follows each convolution (1706.02677, section 5.1),
would never learn here: relu passes no gradient at 0. A zero K₂ makes no jump either, as no norm of the branch follows
it. The block has its stage's born width W: 2·9·C·W + 2·C + 2·W parameters.
"""

from dataclasses import dataclass
from typing import ClassVar

from esper.platform.contracts import SiteKind
from esper.workers.kasmina.blueprints.units import Layer
from esper.workers.kasmina.registry import register


@register
@dataclass(frozen=True)
class ConvBlockSeed(Layer):
    """One block at a time."""

    name: ClassVar[str] = "conv_block"
    site_kind: ClassVar[SiteKind] = "conv_stream"
    adds: ClassVar[str] = "layer"
