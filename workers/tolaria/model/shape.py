"""A transformer's shape without its tensors: sites, parameters and FLOPs in closed form.

V vocabulary, T block size, C embedding, H heads, D head dimension, W MLP neurons.
"""

from dataclasses import dataclass
from typing import Self

from esper.platform.contracts import InjectionSpec
from esper.platform.host_spec import ExpertSpec, HostSpec, LayerSpec
from esper.workers.kasmina.registry import names_for
from esper.workers.tolaria.model.layered import LayeredShape


@dataclass(frozen=True)
class TransformerShape(LayeredShape):
    """A whole transformer's shape.

    Sites: `wte.stream`, then `h<uid>.attention`, `h<uid>.ffn`, `h<uid>.stream` per layer; uids are never used again.
    """

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
        experts = sum(c + 2 * c * expert.width + expert.width + c for expert in layer.experts)
        return attention, mlp + experts, 4 * c
