"""Checkpoints: one safetensors file that is whole or absent, and refused when any byte differs. Nothing is pickled.

The metadata holds the state, the version, and the file's SHA-256, taken with 64 zeros in its place. A place is a path
(one rename) or a URI (one PUT; `s3://…`, https://arrow.apache.org/docs/python/filesystems.html).
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pyarrow import fs
from torch import Tensor

from esper.platform.console import say
from esper.platform.errors import UserError, clipped, in_a_sentence, reason
from esper.platform.storage import write_bytes

VERSION = "2"  # 1 was a folder of three files
SUFFIX = ".safetensors"
NO_DIGEST = "0" * 64
MEND = "restore it from a copy, or start the run anew"

Content = tuple[Any, dict[str, Tensor]]  # state and tensors


def pack(state: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """A checkpoint as the bytes of its file; raises what json or safetensors raise for what they cannot hold.

    `state` is a JSON value, without tuples and with finite numbers. `tensors` are dense and real; memory they share is
    written for each, `requires_grad` is not kept.
    """
    text = json.dumps(state, allow_nan=False, separators=(",", ":"))
    data = safetensors.torch.save(_unshared(tensors), {"version": VERSION, "state": text, "sha256": NO_DIGEST})
    return _marked(data, NO_DIGEST, hashlib.sha256(data).hexdigest())


def unpack(data: bytes, name: str) -> Content:
    """State and tensors (CPU, own memory); raises UserError, with `name`, for another version or any changed byte."""
    with in_a_sentence(f"checkpoint {name} is damaged", MEND):
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if (version := metadata["version"]) != VERSION:
            wanted = f"this code reads version {VERSION}, so go on with the Esper that wrote it"
            raise ValueError(f"it is of version {clipped(version)} and {wanted}")
        digest = metadata.get("sha256", "")
        if hashlib.sha256(_marked(data, digest, NO_DIGEST)).hexdigest() != digest:
            raise ValueError("its checksum differs")
        return json.loads(metadata["state"]), safetensors.torch.load(data)


def write(path: Path, state: Any, tensors: Mapping[str, Tensor]) -> None:
    """`pack` to a file; raises OSError with the old file intact."""
    for left in path.parent.glob(f".{path.name}.*.partial"):  # of a dead process; the disk may be full
        left.unlink(missing_ok=True)
    write_bytes(path, pack(state, tensors))


def read(path: Path) -> Content:
    """`unpack` from a file; raises UserError where it is missing, unreadable or damaged."""
    with in_a_sentence(f"checkpoint {path} is damaged", MEND):
        if not path.exists():  # which raises for a name that no file can have
            raise UserError(f"checkpoint {path} is not there: name the file of one, or start the run anew.")
        return unpack(path.read_bytes(), str(path))


def below(place: str, folder: str) -> str:
    """A folder below a path or URI; a URI keeps its query."""
    if "://" not in place:
        return str(Path(place).expanduser().absolute() / folder)
    head, mark, query = place.partition("?")
    return f"{head.rstrip('/')}/{folder}{mark}{query}"


class CheckpointStore(AbstractContextManager["CheckpointStore"]):
    """The newest checkpoint of each run, `<place>/<name>.safetensors`, written by one thread.

    One process at a time may save under a name. A failed write is said once and the run goes on; `failed` says why the
    last write failed, or is None. Raises UserError where the URI is unknown or unreachable.
    """

    def __init__(self, place: str | Path) -> None:
        self.failed: str | None = None
        self._place = str(place)
        mend = "give a path that every node sees, or a URI such as s3://bucket/folder"
        with in_a_sentence(f"checkpoints cannot be kept in {place!r}", mend):
            path = str(Path(place).expanduser().absolute())
            self._system, self._folder = fs.FileSystem.from_uri(self._place if "://" in self._place else path)
        self._newest: dict[str, Content | None] = {}  # by name, what is to be written; None stands for its removal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")  # joined at exit

    def save(self, name: str, state: Any, tensors: Mapping[str, Tensor]) -> None:
        """Queue what `pack` takes; of one name only the newest is written. Leave its tensors as they are: no copies."""
        self._queue(name, (state, dict(tensors)))

    def drop(self, name: str) -> None:
        self._queue(name, None)

    def find(self, name: str) -> Content | None:
        """A run's newest checkpoint, after a flush; None where it is missing or damaged."""
        self.flush()
        try:
            with self._system.open_input_stream(self._path(name)) as stream:
                return unpack(stream.read(), name)
        except (OSError, UserError):
            return None

    def keep_only(self, names: Iterable[str]) -> None:
        self.flush()
        files = self._system.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        there = {file.base_name.removesuffix(SUFFIX) for file in files if file.base_name.endswith(SUFFIX)}
        for name in there - set(names):
            self.drop(name)

    def flush(self) -> None:
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Flush and end the thread. Idempotent."""
        self._thread.shutdown(wait=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}{SUFFIX}"

    def _queue(self, name: str, content: Content | None) -> None:
        self._newest[name] = content
        self._thread.submit(self._take, name)

    def _take(self, name: str) -> None:
        """Write or remove what was queued last under a name, unless an earlier call has done so."""
        if name not in self._newest:
            return
        content = self._newest.pop(name)
        try:
            if content is None:
                with contextlib.suppress(OSError):
                    self._system.delete_file(self._path(name))
            elif isinstance(self._system, fs.LocalFileSystem):
                write(Path(self._path(name)), *content)
            else:
                with self._system.open_output_stream(self._path(name)) as stream:  # it is there once it is closed
                    stream.write(pack(*content))
            self.failed = None
        except Exception as error:  # whatever it is, the run is worth more than its checkpoint
            first = self.failed is None
            self.failed = (
                f"checkpoint {name} was not written to {self._place} ({reason(error)}): "
                "mend that while the run goes on, and its next one is written."
            )
            if first:
                say(self.failed)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, as safetensors asks for; copied only where it has none."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        own = tensor.is_cpu and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        own = own and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        found[name] = tensor.detach() if own else tensor.detach().clone(memory_format=torch.contiguous_format)
    return found


def _marked(data: bytes, digest: str, other: str) -> bytes:
    """A file with another digest in its metadata; inside the state's text, the quotes would be escaped."""
    return data.replace(f'"sha256":"{digest}"'.encode(), f'"sha256":"{other}"'.encode(), 1)
