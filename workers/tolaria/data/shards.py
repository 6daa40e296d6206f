"""Prepared text: an uncompressed Arrow file of token ids per split, and their manifest.

The files are mapped into memory, so all processes of a machine share one copy.
"""

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_core import from_json

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec
from esper.workers.tolaria.data import tokenizer
from esper.workers.tolaria.data.batches import Batches, held_out, too_short

VERSION = 2  # 1 cut a split into several files
FILE = "manifest.json"

Split = Literal["train", "valid"]


class SplitManifest(Frozen):
    """The counts of one split, and its file's checksum."""

    documents: PositiveInt
    tokens: PositiveInt  # one end per document included
    characters: NonNegativeInt  # without ends, as bytes
    bytes: NonNegativeInt  # of UTF-8
    unseen: NonNegativeInt  # characters that the tokenizer does not know
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Frozen):
    """The content of `manifest.json`."""

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
        """Tokens of each split."""
        return {name: split.tokens for name, split in self.splits.items()}

    @property
    def made_with(self) -> str:
        """The setting that it is to be used with."""
        return f"data.tokenizer={self.tokenizer}"

    @property
    def notice(self) -> str:
        """What a user should know of it, if anything."""
        unseen = sum(split.unseen for split in self.splits.values())
        told = f"{unseen:,} characters of the validation text are not in the training text: one reserved id"
        return told if unseen else ""

    def __str__(self) -> str:
        return f"{self.source}, {self.tokenizer}: {self.counts['train']:,} training tokens"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`'s manifest; UserError where it is missing, damaged or of another version."""
        try:
            return cls.checked(from_json((folder / FILE).read_bytes()), FILE)
        except (OSError, ValueError) as error:
            raise _unusable(folder / FILE, error) from None


def kind_of(folder: Path) -> str:
    """What `folder` was prepared as: images, or else text (damaged manifests too)."""
    try:
        values = from_json((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return "text"
    return "images" if isinstance(values, dict) and values.get("kind") == "images" else "text"


def write_split(folder: Path, name: str, ids: np.ndarray) -> str:
    """Write a split's token ids, uint16 or uint32; returns its file's SHA-256."""
    path, batch = folder / f"{name}.arrow", pa.record_batch([pa.array(ids)], names=["tokens"])  # to be one view
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return _sha256(path)


class TokenData:
    """A folder of prepared text, its token ids mapped into memory; pickled as its path."""

    def __init__(self, path: Path, manifest: Manifest, ids: dict[str, np.ndarray]) -> None:
        self.path = path
        self.manifest = manifest
        self.ids = ids  # of a split: uint16 or uint32 (tokens,), read-only

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        """Map a folder's ids; UserError where they are damaged.

        `verify` reads them all and checks SHA-256 and largest id; otherwise only type and length are checked.
        """
        manifest = Manifest.read(path)
        ids = {name: _mapped(path / f"{name}.arrow", split, verify) for name, split in manifest.splits.items()}
        data = cls(path, manifest, ids)
        if verify and max(array.max() for array in ids.values()) >= data.tokenizer.vocab_size:
            raise _unusable(path, "it holds ids that its tokenizer has not")
        return data

    def __reduce__(self) -> tuple:
        return partial(TokenData.open, verify=False), (self.path,)

    def tokens(self, split: Split) -> int:
        return len(self.ids[split])

    def windows(self, split: Split, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` (windows,): int64 (windows, length)."""
        return self.ids[split][starts[:, None] + np.arange(length)].astype(np.int64)

    def check(self, spec: RunSpec) -> None:
        """Raise UserError where a split holds no example of the spec's context."""
        for name, tokens in self.manifest.counts.items():
            if tokens <= spec.host.tokens + 1:
                raise too_short(name, tokens, spec.host.tokens)

    def batches(self, spec: RunSpec, seed: int, part: tuple[float, float], device: torch.device) -> Batches:
        """Training batches of a spec's runs, from the `part` of the training tokens between two fractions."""
        return Batches(spec, partial(self.windows, "train"), self.tokens("train"), seed, part, device)

    def held_out(self, n: int, spec: RunSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` examples evenly from all of the validation text: inputs and targets, int64 (n, T)."""
        return held_out(partial(self.windows, "valid"), self.tokens("valid"), n, spec.host.tokens, device)

    @cached_property
    def tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer of these ids, read at first use; UserError where its file is another."""
        loaded = tokenizer.load(self.manifest.tokenizer, self.path)
        if (loaded.fingerprint, loaded.vocab_size) != (self.manifest.tokenizer_fingerprint, self.manifest.vocab_size):
            raise _unusable(self.path / loaded.FILE, "it is not the tokenizer that made the ids")
        return loaded


def _mapped(path: Path, split: SplitManifest, verify: bool) -> np.ndarray:
    try:
        if verify and _sha256(path) != split.sha256:
            raise ValueError("its SHA-256 is not the manifest's")
        ids = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column("tokens").to_numpy(zero_copy_only=True)
        if ids.dtype not in (np.uint16, np.uint32) or len(ids) != split.tokens:
            raise ValueError(f"{len(ids)} × {ids.dtype}, not {split.tokens} token ids")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _unusable(path, error) from None
    return ids


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unusable(path: Path, how: object) -> UserError:
    how = str(how).removesuffix(".")
    return UserError(f"{path} cannot be used as prepared text ({how}): make its folder anew with `esper prepare`.")
