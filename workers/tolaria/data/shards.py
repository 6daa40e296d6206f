"""Shards: token ids in uncompressed Arrow files, mapped into memory and read in windows.

Pages of a mapped file are shared by all processes of a machine, so hundreds of workers cost the memory of one.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from esper.platform.errors import UserError
from esper.workers.tolaria.data import tokenizer
from esper.workers.tolaria.data.manifest import Manifest, Shard, Split, damaged

SHARD_BYTES = 64 * 2**20
COLUMN = "tokens"


def write_split(folder: Path, split: str, ids: np.ndarray) -> list[Shard]:
    """Write token ids, uint16 or uint32, as shards `train-00000.arrow`, … of at most `SHARD_BYTES` each."""
    size = SHARD_BYTES // ids.itemsize
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [_write(folder / f"{split}-{number:05d}.arrow", part) for number, part in enumerate(parts)]


def _write(path: Path, ids: np.ndarray) -> Shard:
    # One record batch: several would come back as several arrays, not as one view of the map.
    batch = pa.record_batch([pa.array(ids)], names=[COLUMN])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(file=path.name, tokens=len(ids), sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, shard: Shard, *, verify: bool) -> np.ndarray:
    """A read-only view of the shard's ids, without a copy."""
    try:
        if verify and _sha256(path) != shard.sha256:
            raise damaged(path, "is corrupt (its SHA-256 is not the manifest's)")
        ids = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column(COLUMN).to_numpy(zero_copy_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise damaged(path, f"is corrupt ({error})") from None
    if ids.dtype not in (np.uint16, np.uint32) or len(ids) != shard.tokens:
        raise damaged(path, f"holds {len(ids)} × {ids.dtype}, not {shard.tokens} token ids (uint16 or uint32)")
    return ids


class TokenSplit:
    """The tokens of one split as one sequence, over however many shards."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])

    def __deepcopy__(self, memo: dict) -> Self:
        """Itself: the tokens are read-only, and a run that is forked must not copy its text."""
        return self

    @property
    def tokens(self) -> int:
        """Count of tokens."""
        return int(self._ends[-1])

    def largest(self) -> int:
        """The largest id; reads all of them."""
        return max(int(array.max()) for array in self._arrays)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` consecutive tokens from `starts`, int64 (windows,): int64 (windows, length).

        Raises:
            IndexError: a window reaches outside of the split.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(f"windows of {length} from {starts.min()} to {starts.max()} in {self.tokens} tokens")
        positions = starts[:, None] + np.arange(length)
        if len(self._arrays) == 1:
            return self._arrays[0][positions].astype(np.int64)
        out = np.empty(positions.shape, dtype=np.int64)
        shard_of = np.searchsorted(self._ends, positions, side="right")
        for index in np.unique(shard_of):
            inside, array = shard_of == index, self._arrays[index]
            out[inside] = array[positions[inside] - (self._ends[index] - len(array))]
        return out


class TokenData:
    """A folder of prepared shards, mapped into memory. Pickles as its path, and is mapped anew where it arrives."""

    def __init__(self, path: Path, manifest: Manifest, splits: dict[Split, TokenSplit]) -> None:
        self.path = path
        self.manifest = manifest
        self._splits = splits

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        """Map the shards in a folder written by `prepare`.

        To verify is to read every shard once, compare its SHA-256 and hold its ids against the tokenizer; otherwise
        only presence, type and length are checked.

        Raises:
            UserError: no manifest or one of another version; a file is missing, damaged or of another text.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        splits: dict[Split, TokenSplit] = {
            name: TokenSplit([_map(path / shard.file, shard, verify=verify) for shard in split.shards])
            for name, split in manifest.splits.items()
        }
        data = cls(path, manifest, splits)
        if verify and (largest := max(split.largest() for split in splits.values())) >= data.tokenizer.vocab_size:
            raise damaged(path, f"holds token {largest}, and its tokenizer has {data.tokenizer.vocab_size}")
        return data

    def __reduce__(self) -> tuple:
        return _reopen, (self.path,)

    def split(self, name: Split) -> TokenSplit:
        """The training or the validation tokens."""
        return self._splits[name]

    @cached_property
    def tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer that made these ids, read at first use; a UserError where its file is not that."""
        loaded = tokenizer.load(self.manifest.tokenizer, self.path)
        if (loaded.fingerprint, loaded.vocab_size) != (self.manifest.tokenizer_fingerprint, self.manifest.vocab_size):
            raise damaged(self.path / loaded.FILE, "is not the tokenizer that made the shards")
        return loaded


def _reopen(path: Path) -> TokenData:
    return TokenData.open(path, verify=False)
