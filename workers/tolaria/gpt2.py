"""GPT-2's format and ours, both ways: Hugging Face's `GPT2LMHeadModel`, and nanoGPT's form, which has its names.

There the names begin with `transformer.`, QKV rows are all Q, all K, all V, and linears are `Conv1D`, (in, out), in
nanoGPT's form `nn.Linear`. Layers there are alike: what one lacks is filled up with zeros, which are left out again.
V vocabulary, T context, C embedding, H heads, D head dimension, W MLP neurons.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from esper.platform.errors import UserError, in_a_sentence
from esper.platform.frozen import BelowOne, Frozen, Heads
from esper.platform.host_spec import Activation, HostSpec, LayerSpec
from esper.platform.storage import read_json
from esper.workers.tolaria.model.layered import Layout
from esper.workers.tolaria.model.transformer import TransformerHost

CONFIG, MODEL = "config.json", "model.safetensors"  # the files of a folder, as transformers calls them
PREFIX = "transformer."
HEAD, EMBEDDING = "lm_head.weight", f"{PREFIX}wte.weight"  # the two that may be one parameter
IN_A_LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")  # buffers of causal attention without a kernel
SAME = 2e-5  # of the largest logit: what rounding may change; another formula of GELU changes ten times as much
EPSILON = 1e-5  # of GPT-2's layer norms


class GPT2Config(Frozen):
    """What has to be so in a `config.json`; what else it has decides no logits."""

    model_config = ConfigDict(extra="ignore")

    model_type: Literal["gpt2"]
    n_head: Heads
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu"] = "gelu_new"  # the first two are one
    layer_norm_epsilon: float = Field(default=EPSILON, ge=EPSILON, le=EPSILON)
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True
    resid_pdrop: BelowOne = 0.1
    embd_pdrop: BelowOne = 0.1
    attn_pdrop: BelowOne = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(drops := {self.resid_pdrop, self.embd_pdrop, self.attn_pdrop}) > 1:
            raise ValueError(f"resid_pdrop, embd_pdrop and attn_pdrop are {sorted(drops)}, and must be one number.")
        return self


def from_gpt2(model: nn.Module | Path | str) -> TransformerHost:
    """The host that a GPT is: of copies of its weights, which compute the same logits.

    Args:
        model: a GPT in nanoGPT's form, transformers' `GPT2LMHeadModel`, or a folder with `config.json` and
            `model.safetensors`, as `save_pretrained` and `esper export --format gpt2` write. It is not changed.

    Raises UserError where it is no such GPT, or computes other logits from its weights than GPT-2 does.
    """
    if not isinstance(model, nn.Module):
        return _of_folder(Path(model))
    what, state = type(model).__name__, model.state_dict()
    own = _tensors(what, state, needs_head=True)
    settings = _settings(what, model, state)
    host = _host(what, own, **settings, activation=_activation(what, model, settings))
    return host.to(state[EMBEDDING].device).train(model.training)


def to_gpt2(host: TransformerHost, *, linear: bool = False) -> dict[str, Tensor]:
    """The host's weights by GPT-2's names, on the CPU, for a model's `load_state_dict`: `n_layer`, `n_inner` as grown.

    `linear`: for `nn.Linear`s, as in nanoGPT's form, and not for transformers' `Conv1D`. UserError naming a layer
    that GPT-2 cannot have.
    """
    C, D, W = host.shape.n_embd, host.shape.head_dim, max(layer.width for layer in host.shape.layers)
    for layer in host.shape.layers:
        if layer.experts or C % D or layer.heads * D > C:
            raise UserError(
                f"layer h{layer.uid} has {layer.heads} head(s) of {D} dimensions and {len(layer.experts)} expert(s), "
                f"and GPT-2 no experts and heads that fill the embedding, {C}: export in the native format, which "
                """takes any shape, or train with --set 'growth.blueprints={"ffn": {}, "block": {}}'."""
            )
    state = {}
    for name, value in host.state_dict().items():
        tensor = value.detach().cpu()
        if ".attn.c_attn." in name:  # (H·3·D, …) → (3·H·D, …)
            tensor = _padded(tensor.unflatten(0, (-1, 3, D)), 0, C // D).transpose(0, 1).flatten(0, 2)
        elif ".mlp.c_fc." in name:
            tensor = _padded(tensor, 0, W)
        elif name.endswith(".c_proj.weight"):
            tensor = _padded(tensor, 1, C if ".attn." in name else W)
        if not linear and ".c_" in name and name.endswith("weight"):
            tensor = tensor.t()  # (out, in) → (in, out)
        state[name if name == HEAD else f"{PREFIX}{name}"] = tensor.contiguous()
    return state


def config_of(host: TransformerHost, end_id: int | None) -> dict[str, Any]:
    """The `config.json` of a host; `end_id` is the token that ends a document."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": host.shape.vocab_size,
        "n_positions": host.spec.block_size,
        "n_embd": host.spec.n_embd,
        "n_layer": host.shape.depth(),
        "n_head": host.spec.n_embd // host.shape.head_dim,
        "n_inner": max(layer.width for layer in host.shape.layers),
        "activation_function": host.spec.activation,
        "layer_norm_epsilon": host.ln_f.eps,
        "tie_word_embeddings": host.spec.tied,
        "dtype": str(host.wte.weight.dtype).removeprefix("torch."),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), host.spec.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_id),  # as in GPT-2, an end stands before the next start
    }


def _of_folder(folder: Path) -> TransformerHost:
    example, what = "a folder that save_pretrained or `esper export --format gpt2` wrote", str(folder / CONFIG)
    config = GPT2Config.checked(read_json(folder / CONFIG, what, example), what)
    with in_a_sentence(f"{folder / MODEL} cannot be read", f"name {example}, its weights in one file"):
        state = safetensors.torch.load_file(folder / MODEL)
    settings = {"n_head": config.n_head, "tied": config.tie_word_embeddings, "dropout": config.resid_pdrop}
    activation = "gelu" if config.activation_function == "gelu" else "gelu_new"
    tensors = _tensors(str(folder), state, needs_head=not config.tie_word_embeddings)
    if config.tie_word_embeddings and not torch.equal(tensors.pop(HEAD, wte := tensors["wte.weight"]), wte):
        raise UserError(f"{what} ties {HEAD} to {EMBEDDING}, and {MODEL} has two: set tie_word_embeddings to false.")
    return _host(str(folder), tensors, **settings, activation=activation)


def _tensors(what: str, state: Mapping[str, Tensor], *, needs_head: bool) -> dict[str, Tensor]:
    """Float32 copies by our names, linears (out, in), QKV (3·H·D, …); biases may be missing: they are zero."""
    found = {(name if name == HEAD else name.removeprefix(PREFIX)): state[name] for name in state}
    found = {name: tensor for name, tensor in found.items() if not MASKS.search(name)}
    n_layer = len({name.split(".")[1] for name in found if name.startswith("h.")})
    weights = ["wte", "wpe", *(f"h.{i}.{part}" for i in range(max(1, n_layer)) for part in IN_A_LAYER), "ln_f"]
    needed = [*(f"{name}.weight" for name in weights), *([HEAD] if needs_head else [])]
    if lacking := [name if name == HEAD else f"{PREFIX}{name}" for name in needed if name not in found]:
        raise UserError(f"{what} lacks {lacking[0]}: it must have nanoGPT's form, or be a GPT2LMHeadModel.")
    if more := sorted(found.keys() - {*needed, HEAD, *(f"{name}.bias" for name in weights[2:])}):
        raise UserError(f"{what} has {more[0]}, which GPT-2 has not: take it out, or write a host of your own.")
    turned = found["h.0.attn.c_attn.weight"].shape[-1:] != found["wte.weight"].shape[-1:]  # to `Conv1D`s
    own = {
        name: tensor.t() if turned and ".c_" in name and tensor.dim() == 2 else tensor for name, tensor in found.items()
    }
    own = {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in own.items()}
    return {**{f"{name}.bias": torch.zeros(own[f"{name}.weight"].shape[:1]) for name in weights[2:]}, **own}


def _host(what: str, own: dict[str, Tensor], *, n_head: int, tied: bool, **settings: Any) -> TransformerHost:
    """The host of `_tensors`, which it takes."""
    with in_a_sentence(f"{what} is no GPT-2", "its tensors must have the shapes of one"):
        (V, C), T = own["wte.weight"].shape, len(own["wpe.weight"])
        D, layers = C // n_head, list[LayerSpec]()
        for i in range(sum(name.endswith(".ln_1.weight") for name in own)):
            for kind in ("weight", "bias"):  # (3·H·D, …) → (H·3·D, …)
                name = f"h.{i}.attn.c_attn.{kind}"
                own[name] = own[name].unflatten(0, (3, -1, D)).transpose(0, 1).flatten(0, 2)
            heads = _without_padding(own, f"h.{i}.attn.c_attn", f"h.{i}.attn.c_proj", 3 * D, D)
            width = _without_padding(own, f"h.{i}.mlp.c_fc", f"h.{i}.mlp.c_proj", 1, 1)
            layers.append(LayerSpec(uid=i, heads=heads, width=width))
        widest = max(layer.width for layer in layers)
        shape = {"n_layer": len(layers), "layers": layers, "n_embd": C, "block_size": T, "mlp_width": widest}
        spec = HostSpec.model_validate({**shape, "n_head": n_head, "tied": tied, **settings})
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in TransformerHost(spec, V).own_state().items()}
        for name, size in expected.items():
            if own[name].shape != size:
                raise ValueError(f"{name} is of {tuple(own[name].shape)}, and must be of {tuple(size)}")
        layout = Layout(layers=spec.layers or (), next_uid=len(layers))
        return TransformerHost.rebuilt(spec, V, layout, {name: own[name] for name in expected})


def _without_padding(own: dict[str, Tensor], incoming: str, outgoing: str, rows: int, columns: int) -> int:
    """Drop the last units that are zero on both sides, which add nothing and would never learn; how many are left."""
    weight, bias, out = own[f"{incoming}.weight"], own[f"{incoming}.bias"], own[f"{outgoing}.weight"]
    into = torch.cat([weight, bias.unsqueeze(1)], 1).unflatten(0, (-1, rows)).flatten(1).any(1)  # (units,)
    used = into | out.t().unflatten(0, (-1, columns)).flatten(1).any(1)
    units = 1 + max(used.nonzero().flatten().tolist(), default=0)
    own[f"{incoming}.weight"], own[f"{incoming}.bias"] = weight[: units * rows], bias[: units * rows]
    own[f"{outgoing}.weight"] = out[:, : units * columns].contiguous()
    return units


def _settings(what: str, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model's modules tell beside its weights; UserError where weights are tied that a host's are not."""
    attention, owners = model.get_submodule(f"{PREFIX}h.0.attn"), dict[int, str]()
    for name, tensor in state.items():
        owner = owners.setdefault(tensor.data_ptr(), name)
        if owner != name and {owner, name} != {EMBEDDING, HEAD}:
            raise UserError(f"{what} ties {name} to {owner}, and a host only {HEAD} to {EMBEDDING}: untie them first.")
    told = ((getattr(model, "config", None), "n_head"), (attention, "n_head"), (attention, "num_heads"))
    heads = [value for owner, name in told if isinstance(value := getattr(owner, name, None), int)]
    if not heads:
        raise UserError(f"{what} lacks config.n_head, its number of heads: set it, or n_head of its attention.")
    drops = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    if len(drops) > 1:
        raise UserError(f"{what} has dropouts of {sorted(drops)}, and a host has one for all: set one probability.")
    tied = state[HEAD].data_ptr() == state[EMBEDDING].data_ptr()
    return {"n_head": heads[0], "tied": tied, "dropout": max(drops, default=0.0)}


@torch.no_grad()
def _activation(what: str, model: nn.Module, settings: Mapping[str, Any]) -> Activation:
    """The one by which a copy, with random weights that show every part, computes what a host computes."""
    mend = "it must take token ids (B, T) and return logits, or something with them first or as `logits`"
    with in_a_sentence(f"{what} cannot be copied and run on token ids", mend):
        twin, generator = copy.deepcopy(model).to("cpu", torch.float32).eval(), torch.Generator().manual_seed(0)
        for name, parameter in twin.named_parameters():
            flat = parameter.dim() < 2
            embeds = name in (EMBEDDING, f"{PREFIX}wpe.weight")  # small, so that the first norm's eps shows
            scale = 0.1 if flat else 0.02 if embeds else len(parameter[0]) ** -0.5
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values + 1 if flat and name.endswith("weight") else values)
        tensors = _tensors(what, twin.state_dict(), needs_head=True)
        V, T = len(tensors["wte.weight"]), len(tensors["wpe.weight"])
        idx = torch.randint(V, (1, min(T, 16)), generator=generator)
        out = twin(idx)
        theirs = getattr(out, "logits", out[0] if isinstance(out, tuple) else out)[0, -1]  # (V,)
        off = dict[Activation, float]()
        for activation in get_args(Activation):
            host = _host(what, dict(tensors), **settings, activation=activation).eval()
            off[activation] = float((host(idx)[0, -1] - theirs).abs().max() / theirs.abs().max())
    best = min(off, key=lambda activation: off[activation])
    if not off[best] <= SAME:  # NaN too
        raise UserError(
            f"{what} computes other logits from its weights than GPT-2 does (by {off[best]:.0e} of the largest): it "
            f"must have GELU ({' or '.join(off)}), layer norms with eps {EPSILON:g} before each part, and causal "
            "attention of scores over √D."
        )
    return best


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, size - tensor.shape[axis]))
