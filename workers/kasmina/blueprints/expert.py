"""ExpertSeed: a sparsely gated expert beside a layer's MLP (Shazeer et al. 2017, 1701.06538; here without a softmax).

    mlp(x) + Σ_e g_e(x)·E_e(x)   →   mlp(x) + Σ_e g_e(x)·E_e(x) + g_new(x)·0

A new expert takes only tokens that have none; its second matrix and bias are zero at birth. Its router is N(0, 1/C):
scores of normed tokens are about standard normal. Gates, capacity and balance: `tolaria/model/experts.py`.
Parameters: 2·C·W + W + 2·C. Training FLOPs per token: 3·(2·C + share·4·C·W) at the balanced share.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from esper.platform.contracts import HostProtocol, HostShape, SiteKind
from esper.workers.kasmina.blueprints.units import Part, drawn_like
from esper.workers.kasmina.registry import Count, Grafted, register


@register
@dataclass(frozen=True)
class ExpertSeed(Part):
    """An expert of `width` neurons for a `share` of the tokens, up to `limit` in all layers together."""

    name: ClassVar[str] = "expert"
    site_kind: ClassVar[SiteKind] = "post_ffn"
    adds: ClassVar[str] = "expert"

    width: Count = 64  # neurons of an expert
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25  # of the tokens that its gate is balanced to
    limit: Count = 64  # experts of all layers together

    def allowed(self, shape: HostShape, site_id: str) -> bool:
        return shape.experts() < self.limit

    def resized(self, shape: Any, site_id: str) -> HostShape:
        return shape.with_expert(site_id, self.width, self.share)

    @torch.no_grad()
    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> Grafted:
        name, pairs = host.insert(site_id, self.resized(host.shape, site_id))
        siblings = {id(new): sibling for new, sibling in pairs}
        for key, parameter in host.part(name).named_parameters():
            if key == "router":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
            elif key == "c_fc.weight":
                parameter.copy_(drawn_like(siblings[id(parameter)], parameter.shape, generator))
            else:
                parameter.zero_()
        return name, [], pairs
