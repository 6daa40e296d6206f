"""Parts, put in and taken out whole: layers (grown depthwise), and gated parts inside a layer.

The outgoing side of a part is zero, weight and bias, so that it adds nothing: x → x + 0.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from esper.platform.contracts import HostProtocol, HostShape, Resized, SiteKind
from esper.workers.kasmina.blueprints.units import drawn_like
from esper.workers.kasmina.registry import Blueprint, Count, Grafted, Planted, register
from esper.workers.kasmina.slices import Slice


class Part(Blueprint):
    """What every blueprint of a part shares."""

    units = 0

    @torch.no_grad()
    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> Grafted:
        """Zero the outgoing side; what else there is, is as `drawn` says."""
        name, pairs = host.insert(site_id, self.resized(host.shape, site_id))
        part, siblings = host.part(name), {id(new): sibling for new, sibling in pairs}
        outgoing = {id(parameter) for parameter in part.outgoing()}
        for key, parameter in part.named_parameters():
            if id(parameter) in outgoing:
                parameter.zero_()
            else:
                parameter.copy_(self.drawn(key, parameter, siblings[id(parameter)].detach(), generator))
        return name, [], pairs

    def drawn(self, key: str, new: Tensor, sibling: Tensor, generator: torch.Generator) -> Tensor:
        """The value of a parameter of the incoming side: at its sibling's scale; norms 1, biases 0."""
        if new.dim() > 1:
            return drawn_like(sibling, new.shape, generator)
        return torch.zeros_like(new) if key.endswith("bias") else torch.ones_like(new)

    def pruned(self, shape: HostShape, seed: Planted) -> HostShape:
        return shape.without(seed.part)

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        return host.part(seed.part).outgoing()

    def slices(self, host: HostProtocol, seed: Planted, newer: int) -> list[Slice]:
        return [Slice(parameter) for parameter in host.part(seed.part).parameters()]

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Resized], list[Any]]:
        return [], host.remove(seed.part)


class Layer(Part):
    """What every blueprint of a whole layer in a residual stream shares; the spec's `growth.max_layers` bounds them."""

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


@register
@dataclass(frozen=True)
class ResidualSeed(Layer):
    """A layer of a transformer (G_zero in 2405.15319; 2308.06103), after the embeddings or any layer.

    x → x + attn(ln(x)) → + mlp(ln(·)), of the host's born layer shape. Pre-norm needs no branch scale, but first
    updates weigh more in a small stream (`patience`). Parameters: (4·C·H·D + 3·H·D + C) + (2·C·W + W + C) + 4·C.
    """

    name: ClassVar[str] = "block"
    site_kind: ClassVar[SiteKind] = "residual_stream"
    adds: ClassVar[str] = "layer"

    # Incoming side: "zero" draws it at the neighbour's scale (norms 1, biases 0), "copy" takes the neighbour's units.
    init: Literal["zero", "copy"] = "zero"

    def drawn(self, key: str, new: Tensor, sibling: Tensor, generator: torch.Generator) -> Tensor:
        if self.init == "copy":
            return sibling[torch.arange(len(new)) % len(sibling)]  # repeated where it is too small
        return super().drawn(key, new, sibling, generator)


@register
@dataclass(frozen=True)
class ConvBlockSeed(Layer):
    """A residual block of a ResNet (pre-activation, 1603.05027, figure 4e), of its stage's born width W.

    x → x + K₂ ∗ relu(norm(K₁ ∗ relu(norm(x)))) with K₂ = 0. A zero weight of its last norm, which does no harm where a
    norm follows each convolution (1706.02677, section 5.1), would never learn here: relu passes no gradient at 0. A
    zero K₂ makes no jump either, as no norm of the branch follows it. 2·9·C·W + 2·C + 2·W parameters.
    """

    name: ClassVar[str] = "conv_block"
    site_kind: ClassVar[SiteKind] = "conv_stream"
    adds: ClassVar[str] = "layer"


@register
@dataclass(frozen=True)
class ExpertSeed(Part):
    """A sparsely gated expert beside an MLP (1701.06538; here without a softmax): `width` neurons for a `share`.

    mlp(x) + Σ_e g_e(x)·E_e(x) → … + g_new(x)·0: a new expert takes only tokens that have none. Its router is
    N(0, 1/C): scores of normed tokens are about standard normal. Gates, capacity, balance: `tolaria/model/experts.py`.
    Parameters: 2·C·W + W + 2·C. Training FLOPs per token: 3·(2·C + share·4·C·W) at the balanced share.
    """

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

    def drawn(self, key: str, new: Tensor, sibling: Tensor, generator: torch.Generator) -> Tensor:
        if key == "router":
            return torch.randn(new.shape, generator=generator) * new.shape[1] ** -0.5
        return super().drawn(key, new, sibling, generator)


@register
@dataclass(frozen=True)
class ChannelAttentionSeed(Part):
    """Squeeze-and-excitation of a block's branch (1709.01507): a gate of `width` neurons for a block that has none.

    f(x) → 2·σ(Q·silu(P·mean(f(x)) + p) + q)·f(x) with Q = 0, q = 0: 2·σ(0)·f(x) = f(x). The mean is over the pixels of
    each of the branch's C channels; twice the sigmoid, so that it starts as the identity. SiLU, as in EfficientNet
    (1905.11946): the means of all images are much alike, so a relu would be off for all or none. Of R neurons:
    2·C·R + R + C parameters; training FLOPs per image: 3·4·C·R.
    """

    name: ClassVar[str] = "channel_attention"
    site_kind: ClassVar[SiteKind] = "conv"
    adds: ClassVar[str] = "expert"  # a gated part inside a layer

    width: Count = 8  # neurons of the gate

    def allowed(self, shape: Any, site_id: str) -> bool:
        return not shape.layer(site_id).gate

    def resized(self, shape: Any, site_id: str) -> HostShape:
        return shape.with_gate(site_id, self.width)

    def drawn(self, key: str, new: Tensor, sibling: Tensor, generator: torch.Generator) -> Tensor:
        if new.dim() > 1:  # the means of a branch are small: at the scale of a matrix that keeps a size
            return torch.randn(new.shape, generator=generator) * new.shape[1] ** -0.5
        return super().drawn(key, new, sibling, generator)
