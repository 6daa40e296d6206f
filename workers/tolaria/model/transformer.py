"""TransformerHost: a GPT-2 style decoder (Radford et al. 2019, GPT-2's module names) that can grow while it trains.

Its shape comes first: sites, parameters and FLOPs in closed form, without tensors.
Departure: QKV rows are ordered (H, 3, D, C), so that new heads are added at the end.
B batch, T time, C embedding, V vocabulary, H heads, D head dimension, W MLP neurons.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import InjectionSpec
from esper.platform.errors import UserError
from esper.platform.host_spec import Activation, ExpertSpec, HostSpec, LayerSpec
from esper.workers.kasmina.registry import names_for
from esper.workers.tolaria.model.experts import Expert, Experts
from esper.workers.tolaria.model.layered import LayeredHost, LayeredShape, Pairs

Attend = Callable[..., Tensor]

# Its build imports the torch that it is built for.
INSTALL = 'install it with pip install --no-build-isolation "esper-growth[flash-attn]"'


@dataclass(frozen=True)
class TransformerShape(LayeredShape):
    """A transformer's shape; its sites: `wte.stream`, then `h<uid>.attention`, `.ffn` and `.stream` of each layer."""

    vocab_size: int
    block_size: int
    n_embd: int
    head_dim: int
    tied: bool
    born: LayerSpec  # the next new layer
    layers: tuple[LayerSpec, ...]

    @classmethod
    def of(cls, host: HostSpec, vocab_size: int) -> Self:
        width = host.own_width
        layers = host.layers or host.alike(host.n_layer, width, host.n_head)
        head_dim = host.head_dim or host.n_embd // host.n_head
        born = LayerSpec(uid=1 + max(layer.uid for layer in layers), heads=host.n_head, width=width)
        return cls(vocab_size, host.block_size, host.n_embd, head_dim, host.tied, born, layers)

    def injection_specs(self) -> tuple[InjectionSpec, ...]:
        """The site after the embeddings and three per layer, in forward order."""
        attention, mlp, stream = (names_for(kind) for kind in ("pre_attention", "post_ffn", "residual_stream"))
        embeddings = self.parameters_count() - self.parameters_count(non_embedding=True)
        specs = [InjectionSpec("wte.stream", "residual_stream", 0.0, stream, 0, embeddings)]
        for i, layer in enumerate(self.layers):
            before, at, after = (place / len(self.layers) for place in (i, i + 0.5, i + 1))
            parts, name = self._layer_parts(layer), f"h{layer.uid}"
            specs += [
                InjectionSpec(f"{name}.attention", "pre_attention", before, attention, layer.heads, parts[0]),
                InjectionSpec(f"{name}.ffn", "post_ffn", at, mlp, layer.width, parts[1]),
                InjectionSpec(f"{name}.stream", "residual_stream", after, stream, 0, sum(parts)),
            ]
        return tuple(specs)

    def parameters_count(self, *, non_embedding: bool = False) -> int:
        """Count of parameters, a tied head once; `non_embedding` leaves out wte, wpe and lm_head."""
        body = sum(sum(self._layer_parts(layer)) for layer in self.layers) + 2 * self.n_embd
        outside = self.n_embd * ((1 if self.tied else 2) * self.vocab_size + self.block_size)
        return body if non_embedding else body + outside

    def flops_per_token(self) -> int:
        """Training FLOPs per token, three times the forward's matrix products; experts count by their share of tokens.

        2 per weight, and 4·T·H·D per layer for attention, without a causal discount (PaLM, 2204.02311, appendix B).
        """
        forward = 2.0 * self.n_embd * self.vocab_size
        for layer in self.layers:
            inner = layer.heads * self.head_dim
            forward += 2 * self.n_embd * (4 * inner + 2 * layer.width) + 4 * self.block_size * inner
            for expert in layer.experts:
                forward += 2 * self.n_embd * (1 + expert.share * 2 * expert.width)
        return round(3 * forward)

    def experts(self) -> int:
        return sum(len(layer.experts) for layer in self.layers)

    def expert_parameters(self) -> int:
        return sum(self._of_expert(expert) for layer in self.layers for expert in layer.experts)

    def with_units(self, site_id: str, units: int) -> Self:
        """A copy with `units` more heads or neurons at a site; fewer, if negative."""
        field = "heads" if site_id.endswith(".attention") else "width"
        return self._with(site_id, **{field: getattr(self.layer(site_id), field) + units})

    def with_expert(self, site_id: str, width: int, share: float) -> Self:
        experts = self.layer(site_id).experts
        uid = 1 + max((expert.uid for expert in experts), default=-1)
        return self._with(site_id, experts=(*experts, ExpertSpec(uid=uid, width=width, share=share)))

    def with_layer(self, site_id: str) -> Self:
        return self._inserted(self.position(site_id))

    def attention_parameters(self) -> int:
        return 4 * self.n_embd * self.head_dim * sum(layer.heads for layer in self.layers)

    def totals(self) -> tuple[int, ...]:
        heads, widths = sum(layer.heads for layer in self.layers), sum(layer.width for layer in self.layers)
        return self.depth(), heads, widths, self.experts()

    def position(self, stream_id: str) -> int:
        """Index of a layer inserted at this stream site; `ValueError` for any other id."""
        return ["wte.stream", *(f"h{layer.uid}.stream" for layer in self.layers)].index(stream_id)

    def _layer_parts(self, layer: LayerSpec) -> tuple[int, int, int]:
        c, inner = self.n_embd, layer.heads * self.head_dim
        attention = 4 * c * inner + 3 * inner + c
        mlp = 2 * c * layer.width + layer.width + c
        return attention, mlp + sum(map(self._of_expert, layer.experts)), 4 * c

    def _of_expert(self, expert: ExpertSpec) -> int:
        return 2 * self.n_embd * expert.width + expert.width + 2 * self.n_embd


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
    """torch's kernel, for any device and float dtype: q, k and v (B, T, H, D) → (B, T, H, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
    """FlashAttention-2 (Dao 2023, 2307.08691): float16 or bfloat16 on a CUDA GPU, D at most 256."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, dropout_p=dropout, causal=True, deterministic=deterministic)


KERNELS: dict[str, Attend] = {"sdpa": sdpa, "flash": flash}


def kernel(name: str) -> Attend:
    """The kernel of this name; UserError where this machine cannot run it."""
    if name == "flash":
        what, otherwise = "host.attention is 'flash', but", "or use --set host.attention=sdpa."
        try:
            import flash_attn  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(f"{what} flash-attn cannot be imported ({error}): {INSTALL}, {otherwise}") from None
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
            raise UserError(f"{what} this machine shows no CUDA GPU of Ampere or newer: run on one, {otherwise}")
    return KERNELS[name]


def make_dropout(probability: float) -> nn.Module:
    """Dropout, or the identity at 0, where torch's still draws and multiplies."""
    return nn.Dropout(probability) if probability else nn.Identity()


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; the head count is read off `c_attn`."""

    def __init__(self, n_embd: int, heads: int, head_dim: int, dropout: float, attend: Attend) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.attend = attend
        self.c_attn = nn.Linear(n_embd, heads * 3 * head_dim)  # rows (H, 3, D)
        self.c_proj = nn.Linear(heads * head_dim, n_embd)  # columns (H, D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, 3, self.head_dim)  # (B, T, H, 3, D)
        y = self.attend(*qkv.unbind(3), dropout=self.dropout if self.training else 0.0)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, -1))  # (B, T, H·D) → (B, T, C)


class MLP(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, n_embd: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.approximate = "tanh" if activation == "gelu_new" else "none"
        self.c_fc = nn.Linear(n_embd, width)
        self.c_proj = nn.Linear(width, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """A layer: attention, MLP and experts, each reading the normed stream and adding to it."""

    def __init__(self, shape: TransformerShape, layer: LayerSpec, spec: HostSpec, attend: Attend) -> None:
        super().__init__()
        self.uid = layer.uid
        self.ln_1 = nn.LayerNorm(shape.n_embd)
        self.attn = CausalSelfAttention(shape.n_embd, layer.heads, shape.head_dim, spec.dropout, attend)
        self.ln_2 = nn.LayerNorm(shape.n_embd)
        self.mlp = MLP(shape.n_embd, layer.width, spec.activation)
        self.drop = make_dropout(spec.dropout)
        self.experts = Experts()
        for expert in layer.experts:
            self.add_expert(expert)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        x = x + self.drop(self.attn(self.ln_1(x)))
        normed = self.ln_2(x)
        return x + self.drop(self.experts(normed, self.mlp(normed)))

    def add_expert(self, expert: ExpertSpec) -> Expert:
        """Put an expert beside the MLP, uninitialised except for its balance."""
        new = Expert(self.ln_2.weight.shape[0], expert).to(self.ln_2.weight)
        new.balance = new.balance.float()
        self.experts[f"e{expert.uid}"] = new.train(self.training)
        return new

    def shape(self) -> LayerSpec:
        heads, width = self.attn.c_proj.in_features // self.attn.head_dim, self.mlp.c_proj.in_features
        experts = tuple(expert.shape for expert in self.experts.all())
        return LayerSpec(uid=self.uid, heads=heads, width=width, experts=experts)

    @property
    def inside(self) -> Experts:
        return self.experts

    def outgoing(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if "c_proj" in name.split(".")]


class TransformerHost(LayeredHost):
    """The host; implements HostProtocol. Weights are drawn from the CPU `generator`, by default the global one."""

    Shape = TransformerShape
    OUTPUTS = "wte.weight"

    def __init__(self, spec: HostSpec, vocab_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        self._shape = TransformerShape.of(spec, vocab_size)
        tables = [torch.empty(rows, spec.n_embd) for rows in (vocab_size, spec.block_size)]
        self.wte, self.wpe = (nn.Embedding.from_pretrained(table, freeze=False) for table in tables)
        self.drop = make_dropout(spec.dropout)
        self._attend = kernel(spec.attention)
        self.h = nn.ModuleList(self._layer(layer) for layer in self._shape.layers)
        self.ln_f = nn.LayerNorm(spec.n_embd)
        self.lm_head = nn.Linear(spec.n_embd, vocab_size, bias=False)
        if spec.tied:
            self.lm_head.weight = self.wte.weight
        if not self.wte.weight.is_meta:  # where random numbers import torch's compiler, which takes a second
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's: N(0, 0.02²), residual projections N(0, 0.02²/2L); a router N(0, 1/C), for standard normal scores."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
            else:
                std = 0.02 / math.sqrt(2 * len(self.h)) if "c_proj" in name else 0.02
                std = self.spec.n_embd**-0.5 if name.endswith("router") else std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(self, idx: Tensor) -> Tensor:
        """idx: int64 (B, T), T ≤ block_size → logits (B, T, V)."""
        position = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.drop(self.wte(idx) + self.wpe(position))  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # (B, T, V)

    def linears(self, site_id: str) -> tuple[nn.Linear, nn.Linear]:
        """The pair that units are added to at an attention or MLP site: (incoming rows, outgoing columns)."""
        block, part = self.at(site_id)
        return (block.attn.c_attn, block.attn.c_proj) if part == "attention" else (block.mlp.c_fc, block.mlp.c_proj)

    def written_by(self, site_id: str) -> Iterator[Tensor]:
        """The parameters behind a site's telemetry; for a stream site, those that wrote the stream there."""
        if site_id == "wte.stream":
            return iter((self.wte.weight, self.wpe.weight))
        block, part = self.at(site_id)
        modules = {"attention": [block.attn], "ffn": [block.mlp, block.experts], "stream": [block]}[part]
        return (parameter for module in modules for parameter in module.parameters())

    @torch.no_grad()
    def stream_sizes(self) -> dict[str, float]:
        """Stream site → RMS of the stream there on random tokens; text keeps the order, ratios within a factor of 2."""
        training = self.training
        self.eval()
        device, generator = self.wte.weight.device, torch.Generator().manual_seed(0)
        idx = torch.randint(self.shape.vocab_size, (1, self.shape.block_size), generator=generator).to(device)
        x = self.wte(idx) + self.wpe.weight
        streams = {"wte.stream": x}
        for block in self.blocks():
            streams[f"h{block.uid}.stream"] = x = block(x)
        self.train(training)
        return {site: stream.float().square().mean().sqrt().item() for site, stream in streams.items()}

    def insert(self, site_id: str, shape: TransformerShape) -> tuple[str, Pairs]:
        """Siblings are those of the layer before (else behind) it; an expert's are the MLP's, a router's is `c_fc`."""
        name = shape.part_after(self.shape)
        layer = shape.layer(name)
        if "." not in name:
            return self._put_in(name, shape, self.shape.position(site_id), self._layer(layer))
        block, _ = self.at(site_id)
        new = block.add_expert(layer.experts[-1])
        siblings = {**dict(block.mlp.named_parameters()), "router": block.mlp.c_fc.weight}
        return name, [(parameter, siblings[key]) for key, parameter in new.named_parameters()]

    @classmethod
    def tied(cls, spec: HostSpec) -> Mapping[str, str]:
        return {"lm_head.weight": "wte.weight"} if spec.tied else {}

    def _layer(self, layer: LayerSpec) -> Block:
        return Block(self._shape, layer, self.spec, self._attend)
