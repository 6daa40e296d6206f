"""Exports a trained host as a folder: Esper's format, for any shape, or Hugging Face's GPT-2 layout and tokenizer.

C embedding, H heads, D head dimension, W MLP neurons.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import tokenizers
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.errors import UserError, in_a_sentence
from esper.platform.host_spec import HostSpec, read_host
from esper.platform.spec import RunSpec
from esper.platform.storage import check_unused, new_folder, write_json, write_text
from esper.workers.tolaria.data import Tokenizer, tokenizer
from esper.workers.tolaria.data.tokenizer import END, BytePairs, byte_symbols
from esper.workers.tolaria.hosts import HOSTS, AnyHost, outputs_of, rebuilt
from esper.workers.tolaria.model.layered import Layout
from esper.workers.tolaria.model.shape import TransformerShape
from esper.workers.tolaria.model.transformer import TransformerHost
from esper.workers.tolaria.trainer import within

MODEL = "model.safetensors"  # the name that transformers expects
UNSEEN = "<|unseen|>"  # several characters, so none of the text's


def host_of(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AnyHost:
    """The host in a state of `GrowthRun`, on the CPU in evaluation mode; UserError where there is none."""
    state = within("now/host/", tensors)
    with in_a_sentence("the checkpoint holds no host that is in training", "name one of `esper train`"):
        spec = RunSpec.checked(values["spec"], "the checkpoint").host
        if isinstance(spec, HostSpec):
            spec = spec.model_copy(update={"attention": "sdpa"})  # flash needs the run's machine
        layout = Layout.checked(values["now"]["layout"], "the checkpoint")
        return rebuilt(spec, outputs_of(spec, state), layout, state).eval()


def load_native(folder: Path) -> AnyHost:
    """The host that `export` wrote, on the CPU in evaluation mode; UserError where it cannot be read."""
    values, tensors = checkpoint.read(Path(folder) / MODEL)
    with in_a_sentence(f"{folder} holds no exported host", "export it again"):
        spec = read_host(values["config"], f"{folder} holds no exported host")
        shape = HOSTS[spec.kind].Shape.of(spec, values["vocab_size"])
        layout = Layout(layers=shape.layers, next_uid=shape.born.uid)
        return rebuilt(spec, values["vocab_size"], layout, tensors).eval()


def load_native_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside an exported host; UserError where it is missing or damaged."""
    values, _ = checkpoint.read(Path(folder) / MODEL)
    if values["tokenizer"] is None:
        raise UserError(f"{folder} was exported without a tokenizer: load the one in the folder of its prepared text.")
    return tokenizer.load(values["tokenizer"], Path(folder))


def export(
    host: AnyHost, folder: Path, tokenizer: Tokenizer | None = None, *, to: Literal["native", "gpt2"] = "native"
) -> None:
    """Write a host as a new folder, for `load_native` or transformers; the host is not changed.

    `gpt2` is for `GPT2LMHeadModel.from_pretrained` and `AutoTokenizer`: smaller layers are padded with zeros, which add
    exactly nothing. UserError where it cannot express a layer, the folder is in use or the tokenizer another.
    """
    check_unused(folder)
    if to == "gpt2":
        if not isinstance(host, TransformerHost):
            raise UserError(f"the host is a {host.spec.kind}, and no GPT-2: export in the native format.")
        _check_gpt2(host.shape)
    outputs = outputs_of(host.spec, host.state_dict())
    if tokenizer is not None and tokenizer.vocab_size != outputs:
        what = f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the host {outputs}"
        raise UserError(f"{what}: give the one that its text was prepared with.")
    with new_folder(folder) as partial:
        if isinstance(host, TransformerHost) and to == "gpt2":
            data = safetensors.torch.save(_gpt2_state(host), metadata={"format": "pt"})  # which transformers asks for
            (partial / MODEL).write_bytes(data)
            write_json(partial / "config.json", _gpt2_config(host, None if tokenizer is None else tokenizer.end_id))
            if tokenizer is not None:
                _save_tokenizer(tokenizer, partial, host.spec.block_size)
            return
        born = host.spec.model_copy(update={"n_layer": host.shape.depth(), "layers": host.shape.layers})
        config, name = born.model_dump(mode="json", exclude={"attention"}), None
        if tokenizer is not None:
            tokenizer.save(partial)
            name = tokenizer.name
        state = {"config": config, "vocab_size": outputs, "tokenizer": name}
        checkpoint.write(partial / MODEL, state, _state(host))


def _state(host: AnyHost) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in host.own_state().items()}


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
    for name, tensor in _state(host).items():
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
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), host.spec.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_id),  # as in GPT-2, an end stands before the next start
    }


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Hugging Face's files, for the same ids; but `<|endoftext|>` in a text is one token there, and so is `UNSEEN`."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    config |= {"model_max_length": context, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, BytePairs):
        converted = _byte_pairs(tokenizer)
        converted.add_special_tokens([END])
    else:
        texts = [UNSEEN, *(tokenizer.decode([id]) for id in range(1, tokenizer.vocab_size))]
        vocabulary = {text: id for id, text in enumerate(texts)}
        converted = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNSEEN))
        converted.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        converted.decoder = decoders.Fuse()
        converted.add_special_tokens([UNSEEN, END])
        config["unk_token"] = UNSEEN
    write_text(folder / "tokenizer.json", converted.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", config)


def _byte_pairs(tokenizer: BytePairs) -> tokenizers.Tokenizer:
    """Lists every pair whose join is a token, by the join's rank: tiktoken joins by that rank alone."""
    ranks, symbols = tokenizer.ranks, byte_symbols()
    spelled = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in halves if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in pairs]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    converted = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits as GPT-2 does
    converted.decoder = decoders.ByteLevel()
    return converted
