"""Exports a trained host as a folder: Esper's format, for any shape, or Hugging Face's GPT-2 layout.

C embedding, H heads, D head dimension, W MLP neurons.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.errors import UserError
from esper.platform.spec import HostSpec, RunSpec
from esper.platform.storage import check_unused, new_folder, write_json
from esper.workers.tolaria.data import Tokenizer, tokenizer
from esper.workers.tolaria.export_tokenizer import save_hugging_face
from esper.workers.tolaria.model.linear import GrowableLinear
from esper.workers.tolaria.model.shape import TransformerShape
from esper.workers.tolaria.model.transformer import Layout, TransformerHost

CONFIG, MODEL = "config.json", "model.safetensors"  # names that transformers expects


def host_of(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerHost:
    """The host in a state of `GrowthRun`, on the CPU in evaluation mode; UserError where there is none."""
    prefix = "now/host/"
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def make() -> TransformerHost:
        spec = RunSpec.checked(values["episode"]["spec"], "the checkpoint").host
        spec = spec.model_copy(update={"attention": "sdpa"})  # flash needs the run's machine
        layout = Layout.checked(values["trainer"]["now"]["layout"], "the checkpoint")
        return TransformerHost.rebuilt(spec, len(state["wte.weight"]), layout, state)

    return _loaded(make, "the checkpoint holds no host that is in training", "name one of `esper train`")


def load_native(folder: Path) -> TransformerHost:
    """The host that `export_native` wrote, on the CPU in evaluation mode; UserError where it cannot be read."""
    values, tensors = checkpoint.read(Path(folder) / MODEL)

    def make() -> TransformerHost:
        vocab_size, config = values["vocab_size"], HostSpec.checked(values["config"], "its config")
        shape = TransformerShape.of(config, vocab_size)
        layout = Layout(layers=shape.layers, young={}, next_uid=shape.born.uid)
        return TransformerHost.rebuilt(config, vocab_size, layout, tensors)

    return _loaded(make, f"{folder} holds no exported host", "export it again")


def load_native_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside an exported host; UserError where it is missing or damaged."""
    values, _ = checkpoint.read(Path(folder) / MODEL)
    if values["tokenizer"] is None:
        raise UserError(f"{folder} was exported without a tokenizer: load the one in the folder of its prepared text.")
    return tokenizer.load(values["tokenizer"], Path(folder))


def _loaded(make: Callable[[], TransformerHost], wrong: str, mend: str) -> TransformerHost:
    try:
        return make().eval()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{wrong} ({type(error).__name__}: {reason}): {mend}.") from None


def export_native(host: TransformerHost, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a host of any shape as a new folder, for `load_native`; the host is not changed.

    UserError where the folder is not empty or writable, or the tokenizer's vocabulary differs.
    """
    born = host.spec.model_copy(update={"n_layer": host.shape.depth(), "layers": host.shape.layers})
    config = born.model_dump(mode="json", exclude={"attention"})
    with _exported(host, folder, tokenizer) as partial:
        state = {"config": config, "vocab_size": host.shape.vocab_size, "tokenizer": tokenizer and tokenizer.name}
        checkpoint.write(partial / MODEL, state, fused_state(host))
        if tokenizer is not None:
            tokenizer.save(partial)


def export_gpt2(host: TransformerHost, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a host as a new folder for `transformers.GPT2LMHeadModel.from_pretrained` and `AutoTokenizer`.

    Smaller layers are padded with zeros, which add exactly nothing. UserError as in `export_native` and `check_gpt2`.
    """
    check_gpt2(host.shape)
    with _exported(host, folder, tokenizer) as partial:
        data = safetensors.torch.save(gpt2_state(host), metadata={"format": "pt"})  # which transformers asks for
        (partial / MODEL).write_bytes(data)
        write_json(partial / CONFIG, _gpt2_config(host, None if tokenizer is None else tokenizer.end_id))
        if tokenizer is not None:
            save_hugging_face(tokenizer, partial, context=host.spec.block_size)


def _exported(host: TransformerHost, folder: Path, tokenizer: Tokenizer | None) -> AbstractContextManager[Path]:
    check_unused(Path(folder))
    if tokenizer is not None and tokenizer.vocab_size != host.shape.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the host {host.shape.vocab_size}: "
            "give the one that its text was prepared with."
        )
    return new_folder(Path(folder))


def fused_state(host: TransformerHost) -> dict[str, Tensor]:
    """The state dict on the CPU, every young segment fused, a tied head left out."""
    state = {name: tensor for name, tensor in host.own_state().items() if ".young." not in name}
    for name, module in host.named_modules():
        if isinstance(module, GrowableLinear):
            state[f"{name}.weight"], state[f"{name}.bias"] = module.joined()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def check_gpt2(shape: TransformerShape) -> None:
    """UserError, naming the layer, where GPT-2's layout cannot express the shape."""
    C, D = shape.n_embd, shape.head_dim
    for number, layer in enumerate(shape.layers, start=1):
        if layer.experts:
            reason = f"has {len(layer.experts)} expert(s), and GPT-2 knows none"
        elif C % D or layer.heads * D > C:
            reason = f"has {layer.heads} head(s) of {D} dimensions, and GPT-2's have as many as the embedding, {C}"
        else:
            continue
        raise UserError(
            f"layer {number} of {shape.depth()} (h{layer.uid}) {reason}: export in the native format, which takes any "
            """shape, or train with --set 'growth.blueprints={"ffn": {}, "block": {}}'."""
        )


def gpt2_state(host: TransformerHost) -> dict[str, Tensor]:
    """The host's tensors as transformers has them: linears are `Conv1D` (in, out), QKV is all Q, all K, all V."""
    D, W = host.shape.head_dim, max(layer.width for layer in host.shape.layers)
    H = host.shape.n_embd // D
    state = {}
    for name, tensor in fused_state(host).items():
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
    config, shape = host.spec, host.shape
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": shape.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": shape.depth(),
        "n_head": config.n_embd // shape.head_dim,
        "n_inner": max(layer.width for layer in host.shape.layers),
        "activation_function": "gelu_new",  # GELU by its tanh formula
        "layer_norm_epsilon": host.ln_f.eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": config.tied,
        "bos_token_id": end_id,  # as in GPT-2, a document's end stands before the next one's start
        "eos_token_id": end_id,
        "dtype": str(host.wte.weight.dtype).removeprefix("torch."),
    }
