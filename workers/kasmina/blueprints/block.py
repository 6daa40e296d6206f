"""ResidualSeed: a whole layer in the residual stream (depthwise growth; G_zero in 2405.15319, 2308.06103).

    x → x + attn(ln(x)) → + mlp(ln(·))   with both output projections zero, weight and bias:   x → x + 0 → + 0 = x

The new layer has the shape the host's layers were born with. Its norms start at weight 1 and bias 0, its incoming
matrices as wide as the neighbour's are now. Parameters: (4·C·H·D + 3·H·D + C) + (2·C·W + W + C) + 4·C.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from esper.platform.contracts import HostProtocol, HostShape, SiteKind
from esper.workers.kasmina.blueprints.widen import drawn_like
from esper.workers.kasmina.registry import register


@register
@dataclass(frozen=True)
class ResidualSeed:
    """One layer at a time; the spec's `growth.max_layers` bounds them."""

    name: ClassVar[str] = "block"
    site_kind: ClassVar[SiteKind] = "residual_stream"
    adds: ClassVar[str] = "layer"

    def allowed(self, shape: HostShape, site_id: str) -> bool:
        """Always: the cap on layers is the run's, not the site's."""
        return True

    def resized(self, shape: Any, site_id: str) -> HostShape:
        """The shape with a layer put in."""
        return shape.with_layer(site_id)

    @torch.no_grad()
    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> list[tuple]:
        """Put the layer in; every output projection is zero."""
        block, pairs = host.insert_layer(site_id)
        siblings = {id(new): sibling for new, sibling in pairs}
        for name, parameter in block.named_parameters():
            if ".c_proj." in name or "bias" in name.split("."):
                parameter.zero_()
            elif name.startswith("ln_"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(drawn_like(siblings[id(parameter)], parameter.shape, generator))
        return pairs
