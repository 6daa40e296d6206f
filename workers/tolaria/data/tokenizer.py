"""Tokenizers: `char`, `bpe:N` (learned from the training text) and `gpt2`."""

import base64
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import tiktoken
from pydantic_core import from_json

from esper.platform.deadline import within
from esper.platform.errors import UserError, clipped, in_a_sentence
from esper.platform.storage import write_text

END = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DOWNLOAD_SECONDS = 30.0
MIN_BPE = 257  # every byte, and the end of a document


class Tokenizer(ABC):
    """Text to ids in [0, vocab_size) and back."""

    FILE: ClassVar[str]
    unseen_id: int | None = None  # stands for what cannot be encoded; None where everything can

    def __init__(self, name: str, vocab_size: int, end_id: int, content: str, encoded: str) -> None:
        self.name = name  # `char`, `bpe:1024`, `gpt2`
        self.vocab_size = vocab_size  # count of ids, reserved ones included
        self.end_id = end_id  # stands after every document, and reads `<|endoftext|>`
        self.content = content  # of `FILE`, all that `load` needs, GPT-2's tokens too: ids are read offline
        self.fingerprint = hashlib.sha256(f"{name}\0{encoded}".encode()).hexdigest()[:16]

    @abstractmethod
    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Ids of the documents in turn, each followed by `end_id`; int64 (tokens,)."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; incomplete characters read `\\ufffd`."""

    def encode(self, text: str) -> list[int]:
        return self.encode_documents([text])[:-1].tolist()

    def save(self, folder: Path) -> None:
        write_text(folder / self.FILE, self.content)


class Characters(Tokenizer):
    """One id per character, in code-point order, after two reserved ids: unseen 0, end 1."""

    FILE, unseen_id = "characters.json", 0

    def __init__(self, characters: str) -> None:
        if not isinstance(characters, str) or sorted(set(characters)) != list(characters):
            raise ValueError("it is no string of characters in order")
        super().__init__("char", len(characters) + 2, 1, json.dumps(characters) + "\n", characters)
        self._texts = np.array(["\ufffd", END, *characters], dtype=object)
        self._ids = np.zeros(0x110000, dtype=np.int32)  # by code point
        self._ids[_code_points(characters)] = np.arange(2, self.vocab_size)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        ids = self._ids[_code_points("".join(documents))].astype(np.int64)
        return np.insert(ids, np.cumsum([len(document) for document in documents], dtype=np.int64), self.end_id)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(self._texts[np.asarray(ids, dtype=np.int64)])


class BytePairs(Tokenizer):
    """Byte-level BPE with GPT-2's splitting into words; `tokens` are in order of id and of merging, the end is last."""

    FILE = "ranks.tiktoken"  # in tiktoken's own format

    def __init__(self, name: str, tokens: Sequence[bytes]) -> None:
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(self.ranks) < len(tokens) or not all(bytes([byte]) in self.ranks for byte in range(256)):
            raise ValueError("it lacks a byte, or has a token twice")
        content = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        super().__init__(name, len(tokens) + 1, len(tokens), content, content)
        self._encoding = tiktoken.Encoding(
            name, pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks, special_tokens={END: self.end_id}
        )

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        encoded = self._encoding.encode_ordinary_batch(list(documents), num_threads=os.cpu_count() or 1)
        return np.concatenate([np.asarray([*ids, self.end_id], dtype=np.int64) for ids in encoded])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode(np.asarray(ids, dtype=np.int64).tolist())


def checked_name(name: str) -> str:
    """`name`, if it is `char`, `gpt2` or `bpe:N` with N ≥ 257; UserError otherwise."""
    found = re.fullmatch("char|gpt2|bpe:([1-9][0-9]{2,8})", name)
    if found is None or int(found[1] or MIN_BPE) < MIN_BPE:
        raise UserError(f"unknown tokenizer {clipped(name)}: it must be char, gpt2 or bpe:N, N at least {MIN_BPE}.")
    return name


def build(name: str, documents: Sequence[str]) -> Tokenizer:
    """Learn or fetch the tokenizer `name`; UserError where that fails."""
    if checked_name(name) == "char":
        seen = np.zeros(0x110000, dtype=bool)
        for document in documents:
            seen[_code_points(document)] = True
        return Characters("".join(map(chr, np.flatnonzero(seen))))
    return BytePairs(name, _gpt2_tokens() if name == "gpt2" else _learned_tokens(name, documents))


def load(name: str, folder: Path) -> Tokenizer:
    """Read a saved tokenizer; UserError where it is missing or damaged."""
    path = folder / (Characters if checked_name(name) == "char" else BytePairs).FILE
    with in_a_sentence(f"{path}, the tokenizer, cannot be read", "make the folder anew"):
        content = path.read_bytes()
        if name == "char":
            return Characters(from_json(content))
        loaded = BytePairs(name, [base64.b64decode(line.split()[0]) for line in content.splitlines()])
        if loaded.content.encode() != content:
            raise ValueError("its ranks are not 0, 1, 2, …")
        return loaded


def byte_symbols() -> dict[int, str]:
    """Byte → GPT-2's visible character for it, as in `tokenizers`."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


def _learned_tokens(name: str, documents: Sequence[str]) -> list[bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # needed for learning alone

    size, alphabet = int(name.removeprefix("bpe:")) - 1, pre_tokenizers.ByteLevel.alphabet()
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False, initial_alphabet=alphabet)
    model.train_from_iterator(documents, trainer)
    learned = model.get_vocab()
    if len(learned) < size:
        most = f"bpe:{len(learned) + 1}"
        raise UserError(f"the training text is too small to learn {name}: ask for {most} at most, or give more text.")
    byte = {symbol: byte for byte, symbol in byte_symbols().items()}
    merged = [token for token in sorted(learned, key=learned.__getitem__) if len(token) > 1]
    return [bytes([b]) for b in range(256)] + [bytes(byte[symbol] for symbol in token) for token in merged]


def _gpt2_tokens() -> list[bytes]:
    what = "the gpt2 tokenizer is fetched from the network once, and that failed"
    with in_a_sentence(what, "connect once, or use char or bpe:N"):
        encoding = within(DOWNLOAD_SECONDS, lambda: tiktoken.get_encoding("gpt2"))
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
