"""Prepared text: token ids in uncompressed Arrow files, and their manifest.

The files are mapped into memory, so all processes of a machine share one copy.
"""

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_core import from_json

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.workers.tolaria.data import tokenizer

VERSION = 1
FILE = "manifest.json"
SHARD_BYTES = 64 * 2**20
COLUMN = "tokens"

Split = Literal["train", "valid"]


class Shard(Frozen):
    """One Arrow IPC file of consecutive tokens; its name is never a path."""

    file: str = Field(pattern=r"^(train|valid)-\d{5,9}\.arrow$")
    tokens: PositiveInt
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class SplitManifest(Frozen):
    """The counts of one split, and its shards in order."""

    documents: PositiveInt
    tokens: PositiveInt  # one end per document included
    characters: NonNegativeInt  # without ends, as bytes
    bytes: NonNegativeInt  # of UTF-8
    unseen: NonNegativeInt  # characters that the tokenizer does not know
    shards: tuple[Shard, ...] = Field(min_length=1)


class Manifest(Frozen):
    """The content of `manifest.json`."""

    version: Literal[1]
    source: str  # a name of `SOURCES`, or an absolute path
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=2, le=2**31 - 1)
    valid_fraction: float = Field(gt=0, lt=1)
    max_bytes: PositiveInt | None
    splits: dict[Split, SplitManifest] = Field(min_length=2)

    def fingerprint(self) -> str:
        """A hash of the tokens and their tokenizer, independent of the folder."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps([self.tokenizer_fingerprint, shards]).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`'s manifest; UserError where it is missing, damaged or of another version."""
        try:
            return cls.checked(from_json((folder / FILE).read_bytes()), FILE)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} is no folder of prepared shards (no {FILE}): make one with `esper prepare`."
            ) from None
        except (OSError, ValueError) as error:
            raise damaged(folder / FILE, error) from None


def damaged(path: Path, how: object) -> UserError:
    """The error for an unusable file of prepared shards."""
    how = str(how).removesuffix(".")
    return UserError(f"{path} cannot be used ({how}): delete {path.parent} and make it anew with `esper prepare`.")


def write_split(folder: Path, split: str, ids: np.ndarray) -> tuple[Shard, ...]:
    """Write token ids, uint16 or uint32, as shards `train-00000.arrow`, … of at most `SHARD_BYTES` each."""
    size = SHARD_BYTES // ids.itemsize
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    return tuple(_write(folder / f"{split}-{number:05d}.arrow", part) for number, part in enumerate(parts))


def _write(path: Path, ids: np.ndarray) -> Shard:
    batch = pa.record_batch([pa.array(ids)], names=[COLUMN])  # only one, to be read as one view
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(file=path.name, tokens=len(ids), sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, shard: Shard, *, verify: bool) -> np.ndarray:
    try:
        if verify and _sha256(path) != shard.sha256:
            raise ValueError("its SHA-256 is not the manifest's")
        ids = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column(COLUMN).to_numpy(zero_copy_only=True)
        if ids.dtype not in (np.uint16, np.uint32) or len(ids) != shard.tokens:
            raise ValueError(f"{len(ids)} × {ids.dtype}, not {shard.tokens} token ids")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise damaged(path, error) from None
    return ids


class TokenSplit:
    """The tokens of one split as one sequence over its shards."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])

    def __deepcopy__(self, memo: dict) -> Self:
        """The same object: the tokens are read-only."""
        return self

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` (windows,): int64 (windows, length)."""
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(f"windows of {length} from {starts.min()} to {starts.max()} in {self.tokens} tokens")
        positions = starts[:, None] + np.arange(length)
        if len(self.arrays) == 1:
            return self.arrays[0][positions].astype(np.int64)
        out = np.empty(positions.shape, dtype=np.int64)
        shard_of = np.searchsorted(self._ends, positions, side="right")
        for index in np.unique(shard_of):
            inside, array = shard_of == index, self.arrays[index]
            out[inside] = array[positions[inside] - (self._ends[index] - len(array))]
        return out


class TokenData:
    """A folder of prepared shards, mapped into memory; pickled as its path."""

    def __init__(self, path: Path, manifest: Manifest, splits: dict[Split, TokenSplit]) -> None:
        self.path = path
        self.manifest = manifest
        self._splits = splits

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        """Map a folder's shards; UserError where they are damaged.

        `verify` reads every shard and checks its SHA-256 and largest id; otherwise only type and length are checked.
        """
        manifest = Manifest.read(path)
        splits: dict[Split, TokenSplit] = {
            name: TokenSplit([_map(path / shard.file, shard, verify=verify) for shard in split.shards])
            for name, split in manifest.splits.items()
        }
        data = cls(path, manifest, splits)
        if verify:
            largest = max(array.max() for split in splits.values() for array in split.arrays)
            if largest >= data.tokenizer.vocab_size:
                raise damaged(path, f"it holds token {largest}, and its tokenizer has {data.tokenizer.vocab_size}")
        return data

    def __reduce__(self) -> tuple:
        return partial(TokenData.open, verify=False), (self.path,)

    def split(self, name: Split) -> TokenSplit:
        """The training or the validation tokens."""
        return self._splits[name]

    @cached_property
    def tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer of these ids, read at first use; UserError where its file is another."""
        loaded = tokenizer.load(self.manifest.tokenizer, self.path)
        if (loaded.fingerprint, loaded.vocab_size) != (self.manifest.tokenizer_fingerprint, self.manifest.vocab_size):
            raise damaged(self.path / loaded.FILE, "it is not the tokenizer that made the shards")
        return loaded
