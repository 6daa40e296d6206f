"""TransformerHost: a GPT-2 style decoder that can grow while it trains.

Pre-norm blocks, learned positions, GELU, scaled dot-product attention (Radford et al. 2019; module names are
GPT-2's). Departures: every matrix that can grow is a `GrowableLinear`; QKV rows are ordered by head, (H, 3, D, C),
so that adding a head adds rows at the end and splitting or joining segments changes no bit of the result; heads, MLP
widths and experts are per layer, and the head dimension is a setting of its own. `forward` reads head counts and widths
off the tensors, so a grown host runs the code of a born one.

B batch, T time, C embedding, V vocabulary, H heads, D head dimension, W neurons of the MLP.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import InjectionSpec
from esper.workers.tolaria.model.attention_kernels import Attend, kernel
from esper.workers.tolaria.model.experts import Expert, Experts
from esper.workers.tolaria.model.linear import GrowableLinear, Pairs
from esper.workers.tolaria.model.shape import ExpertShape, LayerShape, TransformerShape


@dataclass(frozen=True)
class TransformerConfig:
    """How a host is born.

    Attributes:
        n_layer: layers; must be their number where `layers` is given.
        n_head: H of a layer, and of layers grafted later.
        head_dim: D; none means n_embd / n_head.
        mlp_width: W of a layer, and of layers grafted later; none means 4 n_embd.
        layers: each layer's own shape; none means that all are alike.
        attention: which of `attention_kernels.KERNELS` computes attention.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    head_dim: int | None = None
    mlp_width: int | None = None
    layers: tuple[LayerShape, ...] | None = None
    tied: bool = True
    dropout: float = 0.0
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide: "
                "change one of them, or set head_dim."
            )
        for layer in self.layers or ():
            if min(layer.heads, layer.width, *(expert.width for expert in layer.experts), 1) < 1:
                raise ValueError(f"{layer} has a count below 1: heads and widths must be at least 1.")
        if self.layers is not None and len(self.layers) != self.n_layer:
            raise ValueError(f"n_layer is {self.n_layer}, but must be the number of layers given, {len(self.layers)}.")

    def shape(self) -> TransformerShape:
        """The shape at birth."""
        born = LayerShape(0, self.n_head, self.mlp_width or 4 * self.n_embd)
        return TransformerShape(
            vocab_size=self.vocab_size,
            block_size=self.block_size,
            n_embd=self.n_embd,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            tied=self.tied,
            born=born,
            layers=self.layers or tuple(replace(born, uid=uid) for uid in range(self.n_layer)),
        )


def make_dropout(probability: float) -> nn.Module:
    """Dropout, or nothing at all: torch's with probability 0 still draws and multiplies."""
    return nn.Dropout(probability) if probability else nn.Identity()


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; the number of heads is read off `c_attn`."""

    def __init__(self, n_embd: int, heads: int, head_dim: int, dropout: float, attend: Attend) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.attend = attend
        self.c_attn = GrowableLinear(n_embd, heads * 3 * head_dim, axis=0)  # rows (H, 3, D)
        self.c_proj = GrowableLinear(heads * head_dim, n_embd, axis=1)  # columns (H, D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, 3, self.head_dim)  # (B, T, H, 3, D)
        y = self.attend(*qkv.unbind(3), dropout=self.dropout if self.training else 0.0)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, -1))  # (B, T, H·D) → (B, T, C)


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
    """A layer: attention and MLP (and experts), each reading the normed stream and adding to it."""

    def __init__(self, shape: TransformerShape, layer: LayerShape, dropout: float, attend: Attend) -> None:
        super().__init__()
        self.uid = layer.uid
        self.ln_1 = nn.LayerNorm(shape.n_embd)
        self.attn = CausalSelfAttention(shape.n_embd, layer.heads, shape.head_dim, dropout, attend)
        self.ln_2 = nn.LayerNorm(shape.n_embd)
        self.mlp = MLP(shape.n_embd, layer.width)
        self.experts: Experts | None = None
        self.drop = make_dropout(dropout)
        for expert in layer.experts:
            self.add_expert(expert)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        x = x + self.drop(self.attn(self.ln_1(x)))
        normed = self.ln_2(x)
        y = self.mlp(normed)
        if self.experts is not None:
            y = self.experts(normed, y)
        return x + self.drop(y)

    def add_expert(self, expert: ExpertShape) -> Expert:
        """Put an expert beside the MLP, uninitialised but for its bias."""
        if self.experts is None:
            self.experts = Experts()
        new = Expert(self.ln_2.weight.shape[0], expert).to(self.ln_2.weight)
        self.experts[f"e{expert.uid}"] = new
        new.balance = new.balance.float()
        return new.train(self.training)

    def remove_expert(self, name: str) -> Expert:
        """Take an expert out."""
        assert self.experts is not None
        expert = self.experts.pop(name)
        if not self.experts:
            del self.experts
            self.experts = None
        assert isinstance(expert, Expert)
        return expert

    def shape(self) -> LayerShape:
        """What the layer is now."""
        experts = tuple(expert.shape for expert in self.experts.all()) if self.experts is not None else ()
        return LayerShape(
            self.uid, self.attn.c_proj.in_features // self.attn.head_dim, self.mlp.c_proj.in_features, experts
        )

    def outgoing(self) -> list[nn.Parameter]:
        """Every tensor through which the layer writes to the stream."""
        return [parameter for name, parameter in self.named_parameters() if "c_proj" in name.split(".")]


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
        self._attend = kernel(config.attention)
        self.h = nn.ModuleList(self._layer(layer) for layer in shape.layers)
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's table: matrices N(0, 0.02²), residual projections N(0, 0.02²/2L), biases 0, norms 1 and 0.

        A router is N(0, 1/C): its scores of a normed token are then about standard normal.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
            else:
                std = 0.02 / math.sqrt(2 * len(self.h)) if "c_proj" in name else 0.02
                std = self.config.n_embd**-0.5 if name.endswith("router") else std
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

    def experts(self) -> int:
        """Experts, over all layers."""
        return self._shape.experts()

    def deepened(self, n_layer: int) -> TransformerShape:
        """The shape grown at the end to `n_layer` layers."""
        return self._shape.deepened(n_layer)

    # -- Growing -----------------------------------------------------------------------------------------------

    def split(self) -> bool:
        """Whether some linear layer holds more than one segment."""
        return any(linear.young is not None for _, linear in self._linears())

    def linears(self, site_id: str) -> tuple[GrowableLinear, GrowableLinear]:
        """The pair that units are added to at an attention or MLP site: (incoming rows, outgoing columns)."""
        block, part = self._at(site_id)
        module = block.attn.c_attn if part == "attention" else block.mlp.c_fc
        return module, (block.attn if part == "attention" else block.mlp).c_proj

    def written_by(self, site_id: str) -> Iterator[Tensor]:
        """The parameters that a site's telemetry is about; for a stream site, what wrote the stream there."""
        if site_id == "wte.stream":
            yield from (self.wte.weight, self.wpe.weight)
            return
        block, part = self._at(site_id)
        yield from {"attention": block.attn, "ffn": block.mlp, "stream": block}[part].parameters()
        if part == "ffn" and block.experts is not None:
            yield from block.experts.parameters()

    @torch.no_grad()
    def stream_sizes(self) -> dict[str, float]:
        """Stream site → root mean square of the stream there, over a context of tokens drawn at random.

        Text gives other numbers, but the same order and ratios within a factor of two (tinystories-char, 3,500 steps
        in: 0.72, 0.75 and 2.5 after embeddings, a grafted layer and the first one, where text gives 0.33, 0.56, 3.1).
        """
        training = self.training
        self.eval()
        device, generator = self.wte.weight.device, torch.Generator().manual_seed(0)
        idx = torch.randint(self.config.vocab_size, (1, self.config.block_size), generator=generator).to(device)
        x = self.wte(idx) + self.wpe.weight
        streams = {"wte.stream": x}
        for block in self._blocks():
            streams[f"h{block.uid}.stream"] = x = block(x)
        self.train(training)
        return {site: stream.float().square().mean().sqrt().item() for site, stream in streams.items()}

    def insert(self, site_id: str, shape: TransformerShape) -> tuple[str, Pairs]:
        """Put in the part that `shape` has and the host has not, uninitialised: (its name, parameters and siblings).

        A layer's siblings are those of the layer before it, or after the embeddings of the layer behind it; an
        expert's are the MLP's, the router's is its incoming matrix.
        """
        name = shape.part_after(self._shape)
        layer = next(layer for layer in shape.layers if layer.uid == int(name[1:].partition(".")[0]))
        if "." in name:
            block, _ = self._at(site_id)
            new = block.add_expert(layer.experts[-1])
            siblings = {**dict(block.mlp.named_parameters()), "router": block.mlp.c_fc.weight}
        else:
            position = self._shape.position(site_id)
            sibling = self.h[max(0, position - 1)]
            assert isinstance(sibling, Block)
            new = self._layer(layer).to(sibling.ln_1.weight).train(self.training)
            self.h.insert(position, new)
            siblings = dict(sibling.named_parameters())
        return name, [(parameter, siblings[key]) for key, parameter in new.named_parameters()]

    def part(self, name: str) -> nn.Module:
        """The module of an inserted part; `KeyError` when it is gone."""
        block = self._block(name.partition(".")[0])
        expert = name.partition(".")[2]
        if not expert:
            return block
        return (block.experts or {})[expert]

    def remove(self, name: str) -> list[nn.Parameter]:
        """Take a part out; returns every parameter that is gone."""
        block = self._block(name.partition(".")[0])
        if "." in name:
            return list(block.remove_expert(name.partition(".")[2]).parameters())
        del self.h[list(self.h).index(block)]
        return list(block.parameters())

    def grown(self) -> None:
        """Read the shape off the tensors again: to be called after every change of them."""
        self._shape = replace(self._shape, layers=tuple(block.shape() for block in self._blocks()))

    # -- Saving ------------------------------------------------------------------------------------------------

    def layout(self) -> dict[str, Any]:
        """What `with_layout` needs to make the same tree of modules and parameters, as JSON values."""
        young = {name: linear.young_sizes() for name, linear in self._linears() if linear.young is not None}
        return {"layers": self._shape.layers_as_json(), "young": young}

    def own_state(self) -> dict[str, Tensor]:
        """The state dict without a tied head's second name."""
        state = self.state_dict()
        if self.config.tied:
            del state["lm_head.weight"]
        return state

    def load_own_state(self, state: Mapping[str, Tensor], *, assign: bool = False) -> None:
        """Load what `own_state` gave; `assign` as in `load_state_dict`."""
        tied = {"lm_head.weight": state["wte.weight"]} if self.config.tied else {}
        self.load_state_dict({**state, **tied}, assign=assign)
        if self.config.tied:
            self.lm_head.weight = self.wte.weight

    @classmethod
    def with_layout(cls, config: TransformerConfig, layout: dict[str, Any]) -> "TransformerHost":
        """A host of this layout; its weights are still to be loaded."""
        layers = TransformerShape.layers_from_json(layout["layers"])
        host = cls(replace(config, n_layer=len(layers), layers=layers), torch.Generator())
        linears = dict(host._linears())
        for name, sizes in layout["young"].items():
            linears[name].split_off(sizes)
        host.config = config
        host._shape = replace(config.shape(), layers=layers)
        return host

    # -- Helpers -----------------------------------------------------------------------------------------------

    def _layer(self, layer: LayerShape) -> Block:
        return Block(self._shape, layer, self.config.dropout, self._attend)

    def _blocks(self) -> Iterator[Block]:
        return (block for block in self.h if isinstance(block, Block))

    def _linears(self) -> Iterator[tuple[str, GrowableLinear]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, GrowableLinear))

    def _block(self, name: str) -> Block:
        for block in self._blocks():
            if name == f"h{block.uid}":
                return block
        raise KeyError(name)

    def _at(self, site_id: str) -> tuple[Block, str]:
        name, _, part = site_id.partition(".")
        return self._block(name), part
