"""ChannelAttentionSeed: squeeze-and-excitation of a block's branch (Hu et al. 2018, 1709.01507).

    f(x)   →   2·σ(Q·silu(P·mean(f(x)) + p) + q) · f(x)   with Q = 0, q = 0:   2·σ(0) · f(x) = f(x)

The mean is over the pixels of each of the branch's C channels; twice the sigmoid, so that it starts as the identity.
SiLU, as in EfficientNet (1905.11946): the means of all images are much alike, so a relu would be off for all or none.
Of R neurons: 2·C·R + R + C parameters. Training FLOPs per image: 3·4·C·R.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from esper.platform.contracts import HostProtocol, HostShape, SiteKind
from esper.workers.kasmina.blueprints.units import Part
from esper.workers.kasmina.registry import Count, Grafted, register


@register
@dataclass(frozen=True)
class ChannelAttentionSeed(Part):
    """A gate of `width` neurons for a block that has none."""

    name: ClassVar[str] = "channel_attention"
    site_kind: ClassVar[SiteKind] = "conv"
    adds: ClassVar[str] = "expert"  # a gated part inside a layer

    width: Count = 8  # neurons of the gate

    def allowed(self, shape: Any, site_id: str) -> bool:
        return not shape.layer(site_id).gate

    def resized(self, shape: Any, site_id: str) -> HostShape:
        return shape.with_gate(site_id, self.width)

    @torch.no_grad()
    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> Grafted:
        name, pairs = host.insert(site_id, self.resized(host.shape, site_id))
        for key, parameter in host.part(name).named_parameters():
            if key == "c_fc.weight":  # the means of a branch are small: at the scale of a matrix that keeps a size
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
            else:
                parameter.zero_()
        return name, [], pairs
