"""Exports a trained host as a folder: Esper's format, for any shape, or Hugging Face's GPT-2 layout and tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.errors import UserError, in_a_sentence
from esper.platform.host_spec import HostSpec, read_host
from esper.platform.spec import RunSpec
from esper.platform.storage import check_unused, new_folder, write_json, write_text
from esper.workers.tolaria.data import TokenData, Tokenizer, tokenizer
from esper.workers.tolaria.data.tokenizer import END, BytePairs, byte_symbols
from esper.workers.tolaria.gpt2 import CONFIG, MODEL, config_of, to_gpt2
from esper.workers.tolaria.hosts import HOSTS, AnyHost, outputs_of, rebuilt
from esper.workers.tolaria.model.layered import Layout
from esper.workers.tolaria.model.transformer import TransformerHost
from esper.workers.tolaria.trainer import within

TOKENIZER = "tokenizer.json"
SAMPLED = 2000  # ids of the text by which tokenizers are compared
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
    if to == "gpt2" and not isinstance(host, TransformerHost):
        raise UserError(f"the host is a {host.spec.kind}, and no GPT-2: export in the native format.")
    outputs = outputs_of(host.spec, host.state_dict())
    if tokenizer is not None and tokenizer.vocab_size != outputs:
        what = f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the host {outputs}"
        raise UserError(f"{what}: give the one that its text was prepared with.")
    with new_folder(folder) as partial:
        if isinstance(host, TransformerHost) and to == "gpt2":
            state = {name: tensor for name, tensor in to_gpt2(host).items() if name not in host.tied(host.spec)}
            data = safetensors.torch.save(state, metadata={"format": "pt"})  # which transformers asks for
            (partial / MODEL).write_bytes(data)
            write_json(partial / CONFIG, config_of(host, None if tokenizer is None else tokenizer.end_id))
            if tokenizer is not None:
                _save_tokenizer(tokenizer, partial, host.spec.block_size)
            return
        born = host.spec.model_copy(update={"n_layer": host.shape.depth(), "layers": host.shape.layers})
        config, name = born.model_dump(mode="json", exclude={"attention"}), None
        if tokenizer is not None:
            tokenizer.save(partial)
            name = tokenizer.name
        state = {"config": config, "vocab_size": outputs, "tokenizer": name}
        checkpoint.write(partial / MODEL, state, host.own_state())


def check_tokenizer(folder: Path, data: TokenData) -> None:
    """Raise UserError where the `tokenizer.json` in a folder, if there is one, gives held-out text other ids."""
    if not (file := folder / TOKENIZER).exists():
        return
    own, ids = data.tokenizer, data.arrays["valid"][:SAMPLED].tolist()
    text = own.decode([id for id in ids if id not in (own.end_id, own.unseen_id)])
    with in_a_sentence(f"{file} cannot be read", "it must be as transformers saves it, or not there"):
        theirs = tokenizers.Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    if theirs != own.encode(text):
        raise UserError(f"{file} gives other ids than the text has: give text prepared with the model's tokenizer.")


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
    write_text(folder / TOKENIZER, converted.to_str(pretty=True))
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
