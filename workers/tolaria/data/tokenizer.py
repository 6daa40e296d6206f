"""Tokenizers: text to token ids and back. `char`, `bpe:N` (learned from the training text) and `gpt2`."""

import base64
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import tiktoken

from esper.platform.errors import UserError, unknown
from esper.platform.storage import write_json, write_text
from esper.workers.tolaria.data import net

END = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_HOST = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
DOWNLOAD_SECONDS = 60.0
MIN_BPE = 257  # every byte, and the end of a document


class Tokenizer(ABC):
    """Text to ids in [0, vocab_size) and back.

    Attributes:
        name: `char`, `bpe:1024`, `gpt2`.
        vocab_size: count of ids, reserved ones included.
        end_id: stands after every document.
        unseen_id: stands for what cannot be encoded; None where everything can.
        FILE: name of the file that `save` writes.
        fingerprint: first 16 hex digits of a SHA-256 of all that decides the encoding.
    """

    name: str
    vocab_size: int
    end_id: int
    unseen_id: int | None = None
    fingerprint: str
    FILE: ClassVar[str]

    @classmethod
    @abstractmethod
    def build(cls, name: str, documents: Sequence[str]) -> Self:
        """Learn (or fetch) the tokenizer called `name` from the training documents."""

    @classmethod
    @abstractmethod
    def load(cls, name: str, folder: Path) -> Self:
        """Read what `save` wrote."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write all that `load` needs."""

    @abstractmethod
    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Ids of the documents one after the other, each followed by `end_id`; int64 (tokens,)."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; the end of a document reads `<|endoftext|>`."""


class Characters(Tokenizer):
    """One id per character of the training text, in code-point order, after two reserved ids: unseen 0, end 1."""

    unseen_id = 0
    end_id = 1
    FILE: ClassVar = "characters.json"

    def __init__(self, characters: str) -> None:
        self.name = "char"
        self.vocab_size = len(characters) + 2
        self.fingerprint = _fingerprint(self.name.encode(), characters.encode())
        self._characters = characters
        self._texts = np.array(["\ufffd", END, *characters], dtype=object)
        self._ids = np.zeros(0x110000, dtype=np.int32)  # by code point
        self._ids[_code_points(characters)] = np.arange(2, self.vocab_size)

    @classmethod
    def build(cls, name: str, documents: Sequence[str]) -> Self:
        """See `Tokenizer.build`."""
        seen = np.zeros(0x110000, dtype=bool)
        for document in documents:
            seen[_code_points(document)] = True
        return cls("".join(map(chr, np.flatnonzero(seen))))

    @classmethod
    def load(cls, name: str, folder: Path) -> Self:
        """See `Tokenizer.load`."""
        return cls(json.loads((folder / cls.FILE).read_text(encoding="utf-8")))

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        write_json(folder / self.FILE, self._characters)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """See `Tokenizer.encode_documents`."""
        ids = self._ids[_code_points("".join(documents))].astype(np.int64)
        return np.insert(ids, np.cumsum([len(document) for document in documents], dtype=np.int64), self.end_id)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`; an unseen character reads `\\ufffd`."""
        return "".join(self._texts[np.asarray(ids, dtype=np.int64)])


class BytePairs(Tokenizer):
    """Byte-level byte-pair encoding with GPT-2's way of splitting text into words; the end is the last id.

    Args:
        name: `bpe:N` or `gpt2`.
        ranks: bytes of each token to its id, which is also the order of merging.
    """

    FILE: ClassVar = "ranks.tiktoken"

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        self.name = name
        self.end_id = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        self.fingerprint = _fingerprint(name.encode(), self._lines.encode())
        self._encoding = tiktoken.Encoding(
            name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: self.end_id}
        )

    @classmethod
    def build(cls, name: str, documents: Sequence[str]) -> Self:
        """See `Tokenizer.build`."""
        return cls(name, _gpt2_ranks() if name == "gpt2" else _learned_ranks(name, documents))

    @classmethod
    def load(cls, name: str, folder: Path) -> Self:
        """See `Tokenizer.load`."""
        pairs = (line.split() for line in (folder / cls.FILE).read_text(encoding="ascii").splitlines())
        return cls(name, {base64.b64decode(token): int(rank) for token, rank in pairs})

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`. GPT-2's ranks too, so that its shards can be read offline."""
        write_text(folder / self.FILE, self._lines)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """See `Tokenizer.encode_documents`; on all cores, in tiktoken's threads."""
        encoded = self._encoding.encode_ordinary_batch(list(documents), num_threads=os.cpu_count() or 1)
        parts = (np.asarray([*ids, self.end_id], dtype=np.int64) for ids in encoded)
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`; bytes that are not UTF-8 (a cut character) read `\\ufffd`."""
        return self._encoding.decode(np.asarray(ids, dtype=np.int64).tolist())


KINDS: dict[str, type[Tokenizer]] = {"char": Characters, "bpe:N": BytePairs, "gpt2": BytePairs}


def kind(name: str) -> type[Tokenizer]:
    """The class behind a tokenizer's name.

    Raises:
        UserError: there is none of this name, or N is not a whole number of at least 257.
    """
    if name.startswith("bpe:") and name != "bpe:N":
        _bpe_size(name)
        return KINDS["bpe:N"]
    if name not in KINDS or name == "bpe:N":
        raise unknown("tokenizer", name, KINDS)
    return KINDS[name]


def _bpe_size(name: str) -> int:
    text = name.removeprefix("bpe:")
    if not (text.isascii() and text.isdecimal()) or int(text) < MIN_BPE or text[0] == "0":
        raise UserError(
            f"tokenizer {name!r}: N must be a whole number of at least {MIN_BPE} (every byte and the end of a "
            "document), for example bpe:1024."
        )
    return int(text)


def _learned_ranks(name: str, documents: Sequence[str]) -> dict[bytes, int]:
    """Learn merges until there are N − 1 tokens; a pair must occur twice to be merged."""
    import tokenizers  # needed for learning alone

    size = _bpe_size(name) - 1
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(documents, trainer)
    learned = model.get_vocab()
    if len(learned) < size:
        raise UserError(
            f"the training text is too small to learn {name}: it gives {len(learned) + 1} tokens, so ask for "
            f"bpe:{len(learned) + 1} at most, or give more text."
        )
    byte = _bytes_of_symbols()
    merged = [token for token in sorted(learned, key=learned.__getitem__) if len(token) > 1]
    tokens = [bytes([b]) for b in range(256)] + [bytes(byte[symbol] for symbol in token) for token in merged]
    return {token: rank for rank, token in enumerate(tokens)}


def _bytes_of_symbols() -> dict[str, int]:
    """GPT-2's spelling of bytes as visible characters, which `tokenizers` uses too, turned round."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


def _gpt2_ranks() -> dict[bytes, int]:
    try:
        try:
            encoding = net.within(net.PROBE_SECONDS, lambda: tiktoken.get_encoding("gpt2"))
        except TimeoutError:
            if not net.answers(GPT2_HOST):
                raise
            encoding = net.within(DOWNLOAD_SECONDS, lambda: tiktoken.get_encoding("gpt2"))  # a slow line
    except (OSError, ValueError) as error:
        raise UserError(
            f"the gpt2 tokenizer is fetched from the network once, and {GPT2_HOST.split('/')[2]} does not answer "
            f"({type(error).__name__}): connect once, or use char or bpe:N."
        ) from None
    return dict(sorted(encoding._mergeable_ranks.items(), key=lambda pair: pair[1]))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _fingerprint(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
