"""A trained host as files for others: Esper's own format, which takes any shape, and Hugging Face's GPT-2 layout.

Either is a folder that appears whole or not at all: `config.json`, `model.safetensors`, and the tokenizer where one is
given. Young segments are joined, which changes no bit, so whether a seed was fused makes no difference.

GPT-2's layout (Radford et al. 2019; `GPT2LMHeadModel` of transformers) computes what our host does and stores it
otherwise: every linear as a `Conv1D`, (in, out); QKV as all of Q, then K, then V, not head by head; one head count and
one MLP width for all layers, heads filling C.

C embedding, H heads, D head dimension, W neurons of an MLP.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.spec import RunSpec
from esper.platform.storage import whole_folder, write_json
from esper.workers.tolaria.data import Tokenizer, tokenizer
from esper.workers.tolaria.export_tokenizer import save_hugging_face
from esper.workers.tolaria.hosts import host_config
from esper.workers.tolaria.model.linear import GrowableLinear
from esper.workers.tolaria.model.shape import TransformerShape
from esper.workers.tolaria.model.transformer import TransformerConfig, TransformerHost

FORMAT, VERSION = "esper-transformer", 1
CONFIG, MODEL = "config.json", "model.safetensors"  # names that transformers expects, too

# -- From a checkpoint -----------------------------------------------------------------------------------------------


def host_of(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerHost:
    """The host in a state of `GrowthRun`, on the CPU, in evaluation mode, as it was at the checkpoint's last step.

    Args:
        values: the state's JSON values; keys that are not the run's own do no harm.
        tensors: the state's tensors; the host takes them, without a copy.

    Raises:
        UserError: it is no state of a run that trains a host.
    """
    prefix = "now/host/"
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        spec = RunSpec.checked(values["books"]["spec"], "the checkpoint")
        config = replace(host_config(spec, len(state["wte.weight"])), attention="sdpa")  # flash needs the run's machine
        host = TransformerHost.with_layout(config, values["trainer"]["now"]["layout"])
        return _loaded(host, state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint holds no host that is in training ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "name one of a run of `esper train`."
        ) from None


# -- Esper's own format ----------------------------------------------------------------------------------------------


def export_native(host: TransformerHost, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a host of any shape as a new folder, for `load_native`.

    `model.safetensors` is the state dict of a host born in this shape (a tied head is left out: it is `wte.weight`);
    `config.json` holds the format, its version, the `TransformerConfig` that this host is born with, and the weights'
    SHA-256. Which kernel computes attention is not part of the model.

    Args:
        host: fused or not; not changed.
        folder: new or empty.
        tokenizer: the one of its text; its own file goes along.

    Raises:
        UserError: the folder is not empty or cannot be written, or the tokenizer has another vocabulary.
    """
    shape = host.shape
    config = asdict(replace(host.config, n_layer=shape.depth(), layers=shape.layers))
    del config["attention"]
    _check_vocabulary(host, tokenizer)
    with _new_folder(folder) as partial:
        digest = _write_model(partial, fused_state(host))
        values = {"format": FORMAT, "version": VERSION, "config": config, "sha256": digest}
        if tokenizer is not None:
            tokenizer.save(partial)
        write_json(partial / CONFIG, {**values, "tokenizer": tokenizer and tokenizer.name})


def load_native(folder: Path) -> TransformerHost:
    """The host that `export_native` wrote, on the CPU, in evaluation mode and in the dtype it had.

    Raises:
        UserError: there is none, it is damaged, or it is of another version.
    """
    folder = Path(folder)
    values = _read_config(folder)
    try:
        data = (folder / MODEL).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{MODEL} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != values.get("sha256"):
        raise _damaged(folder, f"the SHA-256 of {MODEL} is not the one in {CONFIG}")
    try:
        config = values["config"]
        layers = TransformerShape.layers_from_json(config["layers"])
        host = TransformerHost(TransformerConfig(**{**config, "layers": layers}), torch.Generator())
        return _loaded(host, safetensors.torch.load(data))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError):
        raise _damaged(folder, f"{CONFIG} does not describe the host in {MODEL}") from None


def load_native_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `export_native` put beside the host.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = Path(folder)
    name = _read_config(folder).get("tokenizer")
    if name is None:
        raise UserError(f"{folder} was exported without a tokenizer: load the one in the folder of its prepared text.")
    try:
        return tokenizer.kind(name).load(name, folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"its tokenizer cannot be read: {error}") from None


def fused_state(host: TransformerHost) -> dict[str, Tensor]:
    """The state dict of the same host with every young segment fused; without a tied head's second name. On the CPU."""
    state = {name: tensor for name, tensor in host.own_state().items() if ".young." not in name}
    for name, module in host.named_modules():
        if isinstance(module, GrowableLinear):
            state[f"{name}.weight"], state[f"{name}.bias"] = module.joined()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


# -- GPT-2's layout --------------------------------------------------------------------------------------------------


def export_gpt2(host: TransformerHost, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a host as a new folder that `transformers.GPT2LMHeadModel.from_pretrained` reads.

    Args:
        host: fused or not; not changed.
        folder: new or empty.
        tokenizer: the one of its text; written as files for `transformers.AutoTokenizer`.

    Raises:
        UserError: GPT-2's layout cannot express the shape, the folder is not empty or cannot be written, or the
            tokenizer has another vocabulary.
    """
    check_gpt2(host.shape)
    _check_vocabulary(host, tokenizer)
    with _new_folder(folder) as partial:
        _write_model(partial, gpt2_state(host))
        write_json(partial / CONFIG, _gpt2_config(host, None if tokenizer is None else tokenizer.end_id))
        if tokenizer is not None:
            save_hugging_face(tokenizer, partial, context=host.config.block_size)


def check_gpt2(shape: TransformerShape) -> None:
    """Refuse a shape that GPT-2's layout cannot express.

    Raises:
        UserError: naming the first layer that is why.
    """
    width = shape.layers[0].width
    for number, layer in enumerate(shape.layers, start=1):
        inner = layer.heads * shape.head_dim
        if layer.experts:
            reason = f"has {len(layer.experts)} expert(s), and GPT-2 knows none"
        elif inner != shape.n_embd:
            reason = (
                f"has {layer.heads} head(s) of {shape.head_dim} dimensions, {inner} together, "
                f"and GPT-2's have as many as the embedding, {shape.n_embd}"
            )
        elif layer.width != width:
            reason = f"has {layer.width} MLP neurons, unlike the first layer's {width}, and GPT-2's layers are alike"
        else:
            continue
        raise UserError(
            f"layer {number} of {shape.depth()} (h{layer.uid}) {reason}: "
            "export in the native format, which takes any shape."
        )


def gpt2_state(host: TransformerHost) -> dict[str, Tensor]:
    """The host's tensors under transformers' names and in its order."""
    D = host.shape.head_dim
    state = {}
    for name, tensor in fused_state(host).items():
        if name == "lm_head.weight":
            state[name] = tensor
            continue
        if ".c_attn." in name:
            tensor = tensor.unflatten(0, (-1, 3, D)).transpose(0, 1).flatten(0, 2)  # (H·3·D, …) → (3·H·D, …)
        if ".c_" in name and name.endswith("weight"):
            tensor = tensor.t()  # (out, in) → (in, out)
        state[f"transformer.{name}"] = tensor.contiguous()
    return state


def _gpt2_config(host: TransformerHost, end_id: int | None) -> dict[str, Any]:
    config, shape = host.config, host.shape
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": shape.depth(),
        "n_head": shape.layers[0].heads,
        "n_inner": shape.layers[0].width,
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


# -- Helpers ---------------------------------------------------------------------------------------------------------


def _loaded(host: TransformerHost, state: dict[str, Tensor]) -> TransformerHost:
    """The host with these tensors in place of its own, each in its own dtype: an expert's balance is always float32."""
    host.load_own_state(state, assign=True)
    return host.eval()


def _check_vocabulary(host: TransformerHost, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None and tokenizer.vocab_size != host.config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the host {host.config.vocab_size}: "
            "give the one that its text was prepared with."
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` when the block ends without an error."""
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already exists and is not an empty folder: name a new one, or delete it first.")
        with whole_folder(folder.absolute()) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written ({reason}): name a folder you may write to.") from None


def _write_model(folder: Path, state: dict[str, Tensor]) -> str:
    """Write the tensors; returns the file's SHA-256. In one piece, for `save_file` would let only the owner read it."""
    data = safetensors.torch.save(state, metadata={"format": "pt"})  # which transformers asks for
    (folder / MODEL).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no exported host (no {CONFIG}): name a folder that was exported.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{CONFIG} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{folder} is not in Esper's own format: export the host again, in the native format.")
    if values.get("version") != VERSION:
        raise UserError(
            f"{folder} is of version {values.get('version')} and this code reads version {VERSION}: "
            "load it with the Esper that wrote it, or export the host again."
        )
    return values


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"exported host {folder} is damaged ({what}): export it again, or restore it from a copy.")
