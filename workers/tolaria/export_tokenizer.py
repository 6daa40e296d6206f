"""Our tokenizers as Hugging Face's `tokenizer.json` and `tokenizer_config.json`: the same ids for the same text.

One exception: `<|endoftext|>` in a text is one token there. Unseen characters decode to `<|unseen|>`.
"""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from esper.platform.storage import write_json, write_text
from esper.workers.tolaria.data.tokenizer import END, BytePairs, Tokenizer, byte_symbols

UNSEEN = "<|unseen|>"  # several characters, so none of the text's


def save_hugging_face(tokenizer: Tokenizer, folder: Path, *, context: int) -> None:
    """Write a tokenizer into `folder`, for a model that reads at most `context` tokens."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, BytePairs):
        converted = _byte_pairs(tokenizer)
        converted.add_special_tokens([END])
    else:
        converted = _characters(tokenizer)
        converted.add_special_tokens([UNSEEN, END])
        config["unk_token"] = UNSEEN
    write_text(folder / "tokenizer.json", converted.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", config)


def _characters(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    texts = [UNSEEN, *(tokenizer.decode([id]) for id in range(1, tokenizer.vocab_size))]
    vocabulary = {text: id for id, text in enumerate(texts)}
    converted = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNSEEN))
    converted.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    converted.decoder = decoders.Fuse()
    return converted


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
