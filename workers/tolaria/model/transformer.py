"""TransformerHost: a GPT-2 style decoder that can grow while it trains.

Pre-norm blocks, learned positions, GELU, scaled dot-product attention (Radford et al. 2019; module names are
GPT-2's). Departures: every matrix that can grow is a `GrowableLinear`; QKV rows are ordered by head, (H, 3, D, C),
so that adding a head adds rows at the end and splitting or joining segments changes no bit of the result; heads and
MLP widths are per layer, and the head dimension is a setting of its own. The config tells how a host was born, its
tensors what it is now: `forward` reads head counts and widths off them, so a grown host runs the code of a born one.

B batch, T time, C embedding, V vocabulary, H heads, D head dimension, W neurons of the MLP.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import InjectionSpec
from esper.workers.tolaria.model.linear import GrowableLinear, Pairs
from esper.workers.tolaria.model.shape import LayerShape, TransformerShape


@dataclass(frozen=True)
class TransformerConfig:
    """How a host is born.

    Attributes:
        heads: heads of each layer; none means `n_head` everywhere.
        widths: MLP neurons of each layer; none means `mlp_width` everywhere.
        head_dim: D; none means n_embd / n_head.
        mlp_width: W of a layer, and of layers grafted later; none means 4 n_embd.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    head_dim: int | None = None
    mlp_width: int | None = None
    heads: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    tied: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide: "
                "change one of them, or set head_dim."
            )
        for name in ("heads", "widths"):
            values = getattr(self, name)
            if values is not None and (len(values) != self.n_layer or min(values) < 1):
                raise ValueError(f"{name} is {values}, but must be {self.n_layer} counts of at least 1, one a layer.")

    def shape(self) -> TransformerShape:
        """The shape at birth."""
        width = self.mlp_width or 4 * self.n_embd
        heads = self.heads or (self.n_head,) * self.n_layer
        widths = self.widths or (width,) * self.n_layer
        return TransformerShape(
            vocab_size=self.vocab_size,
            block_size=self.block_size,
            n_embd=self.n_embd,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            tied=self.tied,
            born=LayerShape(0, self.n_head, width),
            layers=tuple(LayerShape(i, h, w) for i, (h, w) in enumerate(zip(heads, widths, strict=True))),
        )


def make_dropout(probability: float) -> nn.Module:
    """Dropout, or nothing at all: torch's with probability 0 still draws and multiplies."""
    return nn.Dropout(probability) if probability else nn.Identity()


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; the number of heads is read off `c_attn`."""

    def __init__(self, n_embd: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.c_attn = GrowableLinear(n_embd, heads * 3 * head_dim, axis=0)  # rows (H, 3, D)
        self.c_proj = GrowableLinear(heads * head_dim, n_embd, axis=1)  # columns (H, D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, 3, self.head_dim)  # (B, T, H, 3, D)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H·D) → (B, T, C)


class MLP(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, n_embd: int, width: int) -> None:
        super().__init__()
        self.c_fc = GrowableLinear(n_embd, width, axis=0)
        self.c_proj = GrowableLinear(width, n_embd, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A layer: attention and MLP, each reading the normed stream and adding to it."""

    def __init__(self, shape: TransformerShape, layer: LayerShape, dropout: float) -> None:
        super().__init__()
        self.uid = layer.uid
        self.ln_1 = nn.LayerNorm(shape.n_embd)
        self.attn = CausalSelfAttention(shape.n_embd, layer.heads, shape.head_dim, dropout)
        self.ln_2 = nn.LayerNorm(shape.n_embd)
        self.mlp = MLP(shape.n_embd, layer.width)
        self.drop = make_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))

    def shape(self) -> LayerShape:
        """What the layer is now."""
        return LayerShape(self.uid, self.attn.c_proj.in_features // self.attn.head_dim, self.mlp.c_proj.in_features)


class TransformerHost(nn.Module):
    """The host. Implements HostProtocol: sites, costs, and the tensors at a site.

    Args:
        config: how it is born.
        generator: CPU generator that the weights are drawn from; none means torch's global one.
    """

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        shape = self._shape = config.shape()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = make_dropout(config.dropout)
        self.h = nn.ModuleList(Block(shape, layer, config.dropout) for layer in shape.layers)
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's table: matrices N(0, 0.02²), residual projections N(0, 0.02²/2L), biases 0, norms 1 and 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias.0") or name.endswith("bias"):
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
            else:
                std = 0.02 / math.sqrt(2 * len(self.h)) if "c_proj" in name else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(self, idx: Tensor) -> Tensor:
        """idx: int64 (B, T), T at most block_size → logits (B, T, V)."""
        position = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.drop(self.wte(idx) + self.wpe(position))  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # (B, T, V)

    # -- HostShape ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> TransformerShape:
        """What the host is now."""
        return self._shape

    def injection_specs(self) -> tuple[InjectionSpec, ...]:
        """The sites, from input to output."""
        return self._shape.injection_specs()

    def parameters_count(self, *, non_embedding: bool = False) -> int:
        """Parameters, tied ones counted once; without wte, wpe and lm_head if `non_embedding`."""
        return self._shape.parameters_count(non_embedding=non_embedding)

    def flops_per_token(self) -> int:
        """FLOPs of one training step per token."""
        return self._shape.flops_per_token()

    def depth(self) -> int:
        """Layers."""
        return self._shape.depth()

    def deepened(self, n_layer: int) -> TransformerShape:
        """The shape grown at the end to `n_layer` layers."""
        return self._shape.deepened(n_layer)

    # -- Growing -----------------------------------------------------------------------------------------------

    def split(self) -> bool:
        """Whether some linear layer holds more than one segment."""
        return any(module.split for module in self.modules() if isinstance(module, GrowableLinear))

    def linears(self, site_id: str) -> tuple[GrowableLinear, GrowableLinear]:
        """The pair that units are added to at an attention or MLP site: (incoming rows, outgoing columns)."""
        block, part = self._block(site_id)
        module = block.attn.c_attn if part == "attention" else block.mlp.c_fc
        return module, (block.attn if part == "attention" else block.mlp).c_proj

    def written_by(self, site_id: str) -> Iterator[nn.Parameter]:
        """The parameters that a site's telemetry is about; for a stream site, of the layer before it."""
        block, part = self._block(site_id)
        return {"attention": block.attn, "ffn": block.mlp, "stream": block}[part].parameters()

    def insert_layer(self, site_id: str) -> tuple[Block, Pairs]:
        """Put an uninitialised layer of the born shape into the stream; its siblings are the layer's before it."""
        position = self._shape.position(site_id)
        sibling = self.h[position - 1]
        assert isinstance(sibling, Block)
        layer = LayerShape(self._shape.next_uid(), self._shape.born.heads, self._shape.born.width)
        block = Block(self._shape, layer, self.config.dropout).to(sibling.ln_1.weight)
        block.train(self.training)
        self.h.insert(position, block)
        named = dict(sibling.named_parameters())
        return block, [(parameter, named[name]) for name, parameter in block.named_parameters()]

    def grown(self) -> None:
        """Read the shape off the tensors again: to be called after every change of them."""
        layers = tuple(block.shape() for block in self.h if isinstance(block, Block))
        self._shape = replace(self._shape, layers=layers)

    def _block(self, site_id: str) -> tuple[Block, str]:
        name, _, part = site_id.partition(".")
        for block in self.h:
            if isinstance(block, Block) and name == f"h{block.uid}":
                return block, part
        raise KeyError(site_id)
