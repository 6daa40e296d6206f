"""Checkpoints: one safetensors file that is whole or absent, and refused when any byte differs. Nothing is pickled.

The metadata holds the state, the version, and the file's SHA-256, taken with 64 zeros in its place. A place is a path
(one rename) or a URI (one PUT; `s3://…`, https://arrow.apache.org/docs/python/filesystems.html).
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from pyarrow import fs
from safetensors import SafetensorError
from torch import Tensor

from esper.platform.console import say
from esper.platform.errors import UserError, clipped
from esper.platform.storage import write_bytes

VERSION = 2  # 1 was a folder of three files
SUFFIX = ".safetensors"
DIGEST, NO_DIGEST = b'"sha256":"', b"0" * 64
HEADER_BYTES = 100_000_000  # the most that safetensors reads

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)  # the real types that safetensors 0.6.2 writes and reads

Content = tuple[Any, dict[str, Tensor]]  # state and tensors


def pack(state: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """A checkpoint as the bytes of its file; raises ValueError where it would not read back as it is.

    Args:
        state: a JSON value: dicts with string keys, lists (no tuples), strings, finite numbers, booleans, None.
        tensors: dense, on the CPU, of one of `DTYPES`; shared memory is written in full, `requires_grad` is not kept.
    """
    metadata = {"version": str(VERSION), "state": _state_text(state), "sha256": NO_DIGEST.decode()}
    data = safetensors.torch.save(_own_memory(tensors), metadata)
    if int.from_bytes(data[:8], "little") > HEADER_BYTES:
        raise ValueError("the state is too large for a checkpoint: 100 MB of JSON are the most.")
    place = data.index(DIGEST + NO_DIGEST) + len(DIGEST)
    return data[:place] + hashlib.sha256(data).hexdigest().encode() + data[place + len(NO_DIGEST) :]


def unpack(data: bytes, name: str) -> Content:
    """State and tensors (CPU, own memory); raises UserError, with `name`, for another version or any changed byte."""
    metadata = _metadata(data, name)
    if (version := metadata.get("version")) != str(VERSION):
        raise UserError(
            f"checkpoint {name} is of version {clipped(version)} and this code reads version {VERSION}: "
            "go on with the Esper that wrote it, or start the run anew."
        )
    text = str(metadata.get("sha256")).encode()
    place = data.find(DIGEST + text) + len(DIGEST)
    view, found = memoryview(data), hashlib.sha256()
    for piece in (view[:place], NO_DIGEST, view[place + len(NO_DIGEST) :]):
        found.update(piece)
    if found.hexdigest().encode() != text:
        raise _damaged(name, "its checksum differs")
    try:
        return json.loads(metadata["state"]), safetensors.torch.load(data)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError, SafetensorError) as error:
        raise _damaged(name, f"it cannot be read: {error}") from None  # made so, with a checksum that fits


def write(path: str | Path, state: Any, tensors: Mapping[str, Tensor]) -> None:
    """`pack` to a path or URI, synced; raises UserError for an unknown URI, OSError with the old file intact."""
    _write(*_located(path), pack(state, tensors))


def read(path: str | Path) -> Content:
    """`unpack` from a path or URI; raises UserError where it is missing, unreadable or damaged."""
    return _read(*_located(path), str(path))


def below(place: str, folder: str) -> str:
    """`folder` below a path or URI; a URI keeps its query."""
    if "://" not in place:
        return str(Path(place).expanduser().absolute() / folder)
    head, mark, query = place.partition("?")
    return f"{head.rstrip('/')}/{folder}{mark}{query}"


class CheckpointStore:
    """The newest checkpoint of each run, `<place>/<name>.safetensors`, written by one thread.

    One process at a time may save under a name. A failed write is said once and the run goes on; `failed` says why the
    last write failed, or is None. Raises UserError where the URI is unknown or unreachable.
    """

    def __init__(self, place: str | Path) -> None:
        self.failed: str | None = None
        self._place = str(place)
        self._system, self._folder = _located(place)
        self._waiting: dict[str, Content | None] = {}  # by name; None stands for its removal
        self._writing: Future[None] | None = None  # while the thread has work
        self._closed = False
        self._lock = threading.Lock()  # held for those three
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")  # joined at exit

    def save(self, name: str, state: Any, tensors: Mapping[str, Tensor]) -> None:
        """Queue what `pack` takes and return at once; of one name only the newest is written.

        Tensors are not copied: do not change them afterwards. Raises ValueError where this is closed.
        """
        self._hand_over(name, (state, dict(tensors)))

    def drop(self, name: str) -> None:
        """Remove a run's checkpoint, if there is one."""
        self._hand_over(name, None)

    def load(self, name: str) -> Content:
        """A run's newest checkpoint, after a flush; raises UserError where it is missing or damaged."""
        self.flush()
        return _read(self._system, self._path(name), f"{self._place.rstrip('/')}/{name}{SUFFIX}")

    def find(self, name: str) -> Content | None:
        """`load`, or None where it is missing or damaged."""
        try:
            return self.load(name)
        except UserError:
            return None

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove the checkpoints of all other runs."""
        self.flush()
        kept = {f"{name}{SUFFIX}" for name in names}
        with contextlib.suppress(OSError):
            for info in self._system.get_file_info(fs.FileSelector(self._folder, allow_not_found=True)):
                if info.base_name.endswith(SUFFIX) and info.base_name not in kept:
                    self.drop(info.base_name.removesuffix(SUFFIX))

    def flush(self) -> None:
        """Wait until everything queued is written, or has failed."""
        with self._lock:
            writing = self._writing
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Flush and end the thread. Idempotent."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}{SUFFIX}"

    def _hand_over(self, name: str, content: Content | None) -> None:
        with self._lock:
            if self._closed:
                raise ValueError(f"the checkpoints in {self._place} are closed: save before that.")
            self._waiting[name] = content
            if self._writing is None:
                self._writing = self._thread.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._writing = None
                    return
                name = next(iter(self._waiting))
                content = self._waiting.pop(name)
            if content is None:
                with contextlib.suppress(OSError):
                    self._system.delete_file(self._path(name))
                continue
            try:
                _write(self._system, self._path(name), pack(*content))
                self.failed = None
            except Exception as error:  # whatever it is, the run is worth more than its checkpoint
                first = self.failed is None
                self.failed = (
                    f"checkpoint {name} was not written to {self._place} ({_reason(error)}): "
                    "mend that while the run goes on, and its next one is written."
                )
                if first:
                    with contextlib.suppress(OSError):  # standard error is gone: `failed` still tells
                        say(self.failed)


def _located(place: str | Path) -> tuple[fs.FileSystem, str]:
    if isinstance(place, Path) or "://" not in place:
        return fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    try:
        return fs.FileSystem.from_uri(place)
    except (ValueError, OSError) as error:
        raise UserError(
            f"checkpoints cannot be kept in {place!r} ({_reason(error)}): give a path that every node sees, or a URI "
            "such as s3://bucket/folder."
        ) from None


def _write(system: fs.FileSystem, path: str, data: bytes) -> None:
    if isinstance(system, fs.LocalFileSystem):
        for left in Path(path).parent.glob(f".{Path(path).name}.*.partial"):  # of a dead process; the disk may be full
            left.unlink(missing_ok=True)
        write_bytes(Path(path), data)
        return
    with system.open_output_stream(path) as stream:  # it is there once it is closed
        stream.write(data)


def _read(system: fs.FileSystem, path: str, name: str) -> Content:
    try:
        with system.open_input_stream(path) as stream:
            data = stream.read()
    except FileNotFoundError:
        raise UserError(f"checkpoint {name} is not there: name the file of one, or start the run anew.") from None
    except OSError as error:
        raise _damaged(name, f"it cannot be read: {_reason(error)}") from None
    return unpack(data, name)


def _metadata(data: bytes, name: str) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length]) if length <= HEADER_BYTES else None
    except (ValueError, RecursionError):
        header = None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise _damaged(name, "it is no checkpoint's file")
    return metadata


def _state_text(state: Any) -> str:
    try:
        text = json.dumps(state, allow_nan=False, separators=(",", ":"))
        same = json.loads(text) == state
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the state is not JSON ({error}): hold finite numbers and plain values only.") from None
    if not same:
        raise ValueError("the state would not come back from JSON as it is: use string keys, and lists for tuples.")
    return text


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, none sharing memory; copied only where needed."""
    ours: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise ValueError(f"no tensor may be called {name!r}: safetensors keeps that name to itself.")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise ValueError(
                f"tensor {name!r} is {tensor.layout}, {tensor.dtype} on {tensor.device}: a checkpoint takes dense ones "
                f"on the CPU of {', '.join(map(str, DTYPES))}."
            )
        shares = tensor.untyped_storage().data_ptr() in seen
        if shares or not tensor.is_contiguous() or tensor.is_neg():  # a negative view is a flag, which no file has
            tensor = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        ours[name] = tensor
    return ours


def _damaged(name: str, what: str) -> UserError:
    return UserError(f"checkpoint {name} is damaged ({what}): restore it from a copy, or start the run anew.")


def _reason(error: Exception) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
