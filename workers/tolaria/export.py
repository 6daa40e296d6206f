"""Exports a trained host as a folder: Esper's format, for any shape, or Hugging Face's GPT-2 layout.

C embedding, H heads, D head dimension, W MLP neurons.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.errors import UserError
from esper.platform.spec import HostSpec, RunSpec
from esper.platform.storage import check_unused, new_folder, write_json
from esper.workers.tolaria.data import Tokenizer, tokenizer
from esper.workers.tolaria.export_tokenizer import save_hugging_face
from esper.workers.tolaria.model.shape import TransformerShape
from esper.workers.tolaria.model.transformer import Layout, TransformerHost
from esper.workers.tolaria.trainer import within

MODEL = "model.safetensors"  # the name that transformers expects


def host_of(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerHost:
    """The host in a state of `GrowthRun`, on the CPU in evaluation mode; UserError where there is none."""
    state = within("now/host/", tensors)
    with _said("the checkpoint holds no host that is in training", "name one of `esper train`"):
        spec = RunSpec.checked(values["spec"], "the checkpoint").host
        spec = spec.model_copy(update={"attention": "sdpa"})  # flash needs the run's machine
        layout = Layout.checked(values["now"]["layout"], "the checkpoint")
        return TransformerHost.rebuilt(spec, len(state["wte.weight"]), layout, state).eval()


def load_native(folder: Path) -> TransformerHost:
    """The host that `export` wrote, on the CPU in evaluation mode; UserError where it cannot be read."""
    values, tensors = checkpoint.read(Path(folder) / MODEL)
    with _said(f"{folder} holds no exported host", "export it again"):
        spec = HostSpec.checked(values["config"], "its config")
        shape = TransformerShape.of(spec, values["vocab_size"])
        layout = Layout(layers=shape.layers, young={}, next_uid=shape.born.uid)
        return TransformerHost.rebuilt(spec, values["vocab_size"], layout, tensors).eval()


def load_native_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside an exported host; UserError where it is missing or damaged."""
    values, _ = checkpoint.read(Path(folder) / MODEL)
    if values["tokenizer"] is None:
        raise UserError(f"{folder} was exported without a tokenizer: load the one in the folder of its prepared text.")
    return tokenizer.load(values["tokenizer"], Path(folder))


@contextmanager
def _said(wrong: str, mend: str) -> Iterator[None]:
    """Turn whatever an odd state leads to into a sentence."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{wrong} ({type(error).__name__}: {reason}): {mend}.") from None


def export(
    host: TransformerHost, folder: Path, tokenizer: Tokenizer | None = None, *, to: Literal["native", "gpt2"] = "native"
) -> None:
    """Write a host as a new folder, for `load_native` or transformers; the host is not changed.

    `gpt2` is for `GPT2LMHeadModel.from_pretrained` and `AutoTokenizer`: smaller layers are padded with zeros, which add
    exactly nothing. UserError where it cannot express a layer, where the folder is not empty or writable, or where the
    tokenizer's vocabulary is another.
    """
    check_unused(folder)
    if to == "gpt2":
        _check_gpt2(host.shape)
    if tokenizer is not None and tokenizer.vocab_size != host.shape.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the host {host.shape.vocab_size}: "
            "give the one that its text was prepared with."
        )
    with new_folder(folder) as partial:
        if to == "gpt2":
            data = safetensors.torch.save(_gpt2_state(host), metadata={"format": "pt"})  # which transformers asks for
            (partial / MODEL).write_bytes(data)
            write_json(partial / "config.json", _gpt2_config(host, None if tokenizer is None else tokenizer.end_id))
            if tokenizer is not None:
                save_hugging_face(tokenizer, partial, context=host.spec.block_size)
            return
        born = host.spec.model_copy(update={"n_layer": host.shape.depth(), "layers": host.shape.layers})
        config, name = born.model_dump(mode="json", exclude={"attention"}), None
        if tokenizer is not None:
            tokenizer.save(partial)
            name = tokenizer.name
        state = {"config": config, "vocab_size": host.shape.vocab_size, "tokenizer": name}
        checkpoint.write(partial / MODEL, state, _fused_state(host))


def _fused_state(host: TransformerHost) -> dict[str, Tensor]:
    """The state dict on the CPU, every young segment fused, a tied head left out."""
    state = {name: tensor for name, tensor in host.own_state().items() if ".young." not in name}
    for name, linear in host.growable():
        state[f"{name}.weight"], state[f"{name}.bias"] = linear.joined()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _check_gpt2(shape: TransformerShape) -> None:
    C, D = shape.n_embd, shape.head_dim
    for layer in shape.layers:
        if layer.experts or C % D or layer.heads * D > C:
            raise UserError(
                f"layer h{layer.uid} has {layer.heads} head(s) of {D} dimensions and {len(layer.experts)} expert(s), "
                f"and GPT-2 no experts and heads that fill the embedding, {C}: export in the native format, which "
                """takes any shape, or train with --set 'growth.blueprints={"ffn": {}, "block": {}}'."""
            )


def _gpt2_state(host: TransformerHost) -> dict[str, Tensor]:
    """The host's tensors as transformers has them: linears are `Conv1D` (in, out), QKV is all Q, all K, all V."""
    D, W = host.shape.head_dim, max(layer.width for layer in host.shape.layers)
    H = host.shape.n_embd // D
    state = {}
    for name, tensor in _fused_state(host).items():
        if ".attn.c_attn." in name:  # (H·3·D, …) → (3·H·D, …)
            tensor = _padded(tensor.unflatten(0, (-1, 3, D)), 0, H).transpose(0, 1).flatten(0, 2)
        elif ".mlp.c_fc." in name:
            tensor = _padded(tensor, 0, W)
        elif name.endswith(".c_proj.weight"):
            tensor = _padded(tensor, 1, H * D if ".attn." in name else W)
        if ".c_" in name and name.endswith("weight"):
            tensor = tensor.t()  # (out, in) → (in, out)
        state[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    return state


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, size - tensor.shape[axis]))


def _gpt2_config(host: TransformerHost, end_id: int | None) -> dict[str, Any]:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), host.spec.dropout)
    # As in GPT-2, a document's end stands before the next one's start.
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), end_id)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": host.shape.vocab_size,
        "n_positions": host.spec.block_size,
        "n_embd": host.spec.n_embd,
        "n_layer": host.shape.depth(),
        "n_head": host.spec.n_embd // host.shape.head_dim,
        "n_inner": max(layer.width for layer in host.shape.layers),
        "activation_function": "gelu_new",  # GELU by its tanh formula
        "layer_norm_epsilon": host.ln_f.eps,
        "tie_word_embeddings": host.spec.tied,
        "dtype": str(host.wte.weight.dtype).removeprefix("torch."),
        **dropout,
        **ends,
    }
