"""Prepared text: an Arrow file of token ids per split, their manifest, and batches of windows. B examples, T tokens."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec
from esper.workers.tolaria.data import tokenizer
from esper.workers.tolaria.data.prepared import BaseManifest, Draws, Prepared, Split, digest, evenly, mapped, usable

VERSION = 2  # 1 cut a split into several files


class SplitManifest(Frozen):
    """The counts of one split, and its file's checksum."""

    documents: PositiveInt
    tokens: PositiveInt  # one end per document included
    characters: NonNegativeInt  # without ends, as bytes
    bytes: NonNegativeInt  # of UTF-8
    unseen: NonNegativeInt  # characters that the tokenizer does not know
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseManifest):
    """A text's."""

    made_of: ClassVar[str] = "text"

    version: Literal[2]
    source: str  # a name of `SOURCES`, or an absolute path
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=2, le=2**31 - 1)
    valid_fraction: float = Field(gt=0, lt=1)
    max_bytes: PositiveInt | None
    splits: dict[Split, SplitManifest] = Field(min_length=2)

    def fingerprint(self) -> str:
        """A hash of the tokens and their tokenizer, independent of the folder."""
        digests = {name: [split.sha256] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps([self.tokenizer_fingerprint, digests]).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        return {name: split.tokens for name, split in self.splits.items()}

    @property
    def made_with(self) -> str:
        return f"data.tokenizer={self.tokenizer}"

    @property
    def notice(self) -> str:
        unseen = sum(split.unseen for split in self.splits.values())
        told = f"{unseen:,} characters of the validation text are not in the training text: one reserved id"
        return told if unseen else ""

    def __str__(self) -> str:
        return f"{self.source}, {self.tokenizer}: {self.counts['train']:,} training tokens"


def write_split(folder: Path, name: str, ids: np.ndarray) -> str:
    """Write a split's token ids, uint16 or uint32; returns its file's SHA-256."""
    path, batch = folder / f"{name}.arrow", pa.record_batch([pa.array(ids)], names=["tokens"])  # to be one view
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return digest(path)


class TokenData(Prepared):
    """Prepared text: of a split, uint16 or uint32 ids (tokens,)."""

    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        manifest, ids = Manifest.read(path), {}
        for name, split in manifest.splits.items():
            sha256 = split.sha256 if verify else None
            ids[name] = mapped(path / f"{name}.arrow", "text", sha256, _read, (split.tokens,), np.uint16, np.uint32)
        data = cls(path, manifest, ids)
        if verify and max(array.max() for array in ids.values()) >= data.tokenizer.vocab_size:
            with usable(path, "text"):
                raise ValueError("it holds ids that its tokenizer has not")
        return data

    def windows(self, split: Split, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` (windows,): int64 (windows, length)."""
        return self.arrays[split][starts[:, None] + np.arange(length)].astype(np.int64)

    def check(self, spec: RunSpec) -> None:
        """Raise UserError where they are no data for the spec, or a split holds no example of its context."""
        super().check(spec)
        for name, tokens in self.manifest.counts.items():
            if tokens <= spec.host.tokens + 1:
                raise too_short(name, tokens, spec.host.tokens)

    def batches(self, spec: RunSpec, seed: int, part: tuple[float, float], device: torch.device) -> "Batches":
        """Training batches of a spec's runs, from the `part` of the training tokens between two fractions."""
        self.check(spec)
        return Batches(self, spec, seed, part, device)

    def held_out(self, n: int, spec: RunSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        """`n` whole windows evenly from all of the validation text: inputs and targets, int64 (n, T)."""
        block_size = spec.host.tokens
        starts = evenly(n, (self.manifest.counts["valid"] - 1) // block_size) * block_size
        batch = torch.from_numpy(self.windows("valid", starts, block_size + 1)).to(device)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    @cached_property
    def tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer of these ids, read at first use; UserError where its file is another."""
        loaded = tokenizer.load(self.manifest.tokenizer, self.path)
        with usable(self.path / loaded.FILE, "text"):
            own = self.manifest.tokenizer_fingerprint, self.manifest.vocab_size
            if (loaded.fingerprint, loaded.vocab_size) != own:
                raise ValueError("it is not the tokenizer that made the ids")
        return loaded


class Batches:
    """Random windows of `part`, fractions of the training tokens."""

    def __init__(
        self, data: TokenData, spec: RunSpec, seed: int, part: tuple[float, float], device: torch.device
    ) -> None:
        self._data, self._device, self._block_size = data, device, spec.host.tokens
        low, high = (int(fraction * data.manifest.counts["train"]) for fraction in part)
        last, size = high - self._block_size, spec.data.batch_size
        if last <= low:
            raise too_short("training", high - low, self._block_size)
        self._starts = Draws(seed, "data", lambda random, steps: [random.integers(low, last, (steps, size))])

    def at(self, optimizer_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 (B, T) each."""
        [starts] = self._starts.at(optimizer_step)
        windows = self._data.windows("train", starts, self._block_size + 1)
        batch = torch.from_numpy(windows)  # (B, T + 1)
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


def too_short(which: str, tokens: int, block_size: int) -> UserError:
    """The error for a text, or a slice of one, that holds no example."""
    what = f"the {which} text has {tokens} tokens, too few for a context of {block_size}"
    return UserError(f"{what}: give more text, or set a smaller host.block_size.")


def _read(path: Path) -> np.ndarray:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column("tokens").to_numpy(zero_copy_only=True)
