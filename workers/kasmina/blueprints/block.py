"""ResidualSeed: a whole layer in the residual stream (depthwise growth; G_zero in 2405.15319, 2308.06103).

    x → x + attn(ln(x)) → + mlp(ln(·))   with both output projections zero, weight and bias:   x → x + 0 → + 0 = x

It has the host's born layer shape and follows the embeddings or any layer. Pre-norm needs no branch scale, but
first updates weigh more in a small stream (`patience`). Parameters: (4·C·H·D + 3·H·D + C) + (2·C·W + W + C) + 4·C.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from esper.platform.contracts import HostProtocol, HostShape, SiteKind
from esper.workers.kasmina.blueprints.units import Part, drawn_like
from esper.workers.kasmina.registry import Grafted, register


@register
@dataclass(frozen=True)
class ResidualSeed(Part):
    """One layer at a time; the spec's `growth.max_layers` bounds them."""

    name: ClassVar[str] = "block"
    site_kind: ClassVar[SiteKind] = "residual_stream"
    adds: ClassVar[str] = "layer"

    # Incoming side: "zero" draws it at the neighbour's scale (norms 1, biases 0), "copy" takes the neighbour's units.
    init: Literal["zero", "copy"] = "zero"

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
        name, pairs = host.insert(site_id, self.resized(host.shape, site_id))
        block = host.part(name)
        siblings = {id(new): sibling for new, sibling in pairs}
        outgoing = {id(parameter) for parameter in block.outgoing()}
        for key, parameter in block.named_parameters():
            if id(parameter) in outgoing:
                parameter.zero_()
            elif self.init == "copy":
                sibling = siblings[id(parameter)].detach()
                parameter.copy_(sibling[torch.arange(len(parameter)) % len(sibling)])  # repeated where it is too small
            elif key.endswith("bias"):
                parameter.zero_()
            elif key.startswith("ln_"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(drawn_like(siblings[id(parameter)], parameter.shape, generator))
        return name, [], pairs
