"""ResidualSeed: a whole layer in the residual stream (depthwise growth; G_zero in 2405.15319, 2308.06103).

    x → x + attn(ln(x)) → + mlp(ln(·))   with both output projections zero, weight and bias:   x → x + 0 → + 0 = x

It has the host's born layer shape and follows the embeddings or any layer. Pre-norm needs no branch scale, but
first updates weigh more in a small stream (`patience`). Parameters: (4·C·H·D + 3·H·D + C) + (2·C·W + W + C) + 4·C.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from esper.platform.contracts import SiteKind
from esper.workers.kasmina.blueprints.units import Layer
from esper.workers.kasmina.registry import register


@register
@dataclass(frozen=True)
class ResidualSeed(Layer):
    """One layer at a time."""

    name: ClassVar[str] = "block"
    site_kind: ClassVar[SiteKind] = "residual_stream"
    adds: ClassVar[str] = "layer"

    # Incoming side: "zero" draws it at the neighbour's scale (norms 1, biases 0), "copy" takes the neighbour's units.
    init: Literal["zero", "copy"] = "zero"

    def drawn(self, key: str, new: Tensor, sibling: Tensor, generator: torch.Generator) -> Tensor:
        if self.init == "copy":
            return sibling[torch.arange(len(new)) % len(sibling)]  # repeated where it is too small
        return super().drawn(key, new, sibling, generator)
