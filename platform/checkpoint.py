"""Checkpoints of a run that are whole or absent, and refused when a single byte of them differs.

A checkpoint is a folder of three files, none of them pickled:

- `state.json`: any JSON value; its floats come back exactly.
- `tensors.safetensors`: tensors by name.
- `manifest.json`: the format's version, and the bytes and SHA-256 of the other two, in one canonical form.

It is filled beside its place, synced to the disk, and renamed: a process killed at any moment leaves it whole or not at
all. `Checkpoints` keeps a run's newest one, written by a thread while the run goes on.
"""

import contextlib
import hashlib
import json
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.storage import sync, whole_folder

VERSION = 1
STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    torch.bool,
)
"""What a checkpoint holds: real types that safetensors 0.6.2 writes and reads (0.5.0 lacks uint64, uint32, uint16)."""

Files = dict[str, tuple[int, str]]  # name → bytes, SHA-256 in hexadecimal digits


def write(folder: Path, state: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint as `folder`, on the disk when this returns; its parents are made where missing.

    Args:
        folder: must not exist yet.
        state: a JSON value: dicts with string keys, lists (no tuples), strings, finite numbers, booleans, None.
        tensors: dense, on the CPU, of any shape and of one of `DTYPES`. Views and tensors that share memory are written
            in full, each on its own. `requires_grad` and the order of the names are not kept.

    Raises:
        ValueError: `state` or `tensors` hold what a checkpoint could not give back as it was.
        OSError: it could not be written; nothing is left of it.
    """
    text = _state_text(state)
    ours = _own_memory(tensors)
    if folder.exists():
        raise FileExistsError(f"checkpoint {folder} exists already: name a new folder, or delete it first")
    standing = next(parent for parent in folder.absolute().parents if parent.exists())
    with whole_folder(folder) as partial:
        (partial / STATE).write_bytes(text)
        try:
            safetensors.torch.save_file(ours, partial / TENSORS)
        except SafetensorError as error:  # how it tells of a full disk, too
            raise OSError(f"{TENSORS}: {error}") from None
        (partial / MANIFEST).write_bytes(_manifest({name: _measure(partial / name) for name in (STATE, TENSORS)}))
        for path in (*partial.iterdir(), partial):
            sync(path)
    for parent in folder.absolute().parents:  # the new names, up to the folder that stood before
        sync(parent)
        if parent == standing:
            break


def read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The state and the tensors (on the CPU, each with memory of its own) of a checkpoint, once all of it is verified.

    Raises:
        UserError: there is none, another version of the format wrote it, or any byte of it differs from what was
            written. Nothing of such a checkpoint is loaded.
    """
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} is not there: name the folder of one, or start the run anew.")
    text = _bytes(folder, MANIFEST)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(folder, f"{MANIFEST} is not JSON") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if type(version) is not int:  # `True == 1`
        raise _damaged(folder, f"{MANIFEST} names no version")
    if version != VERSION:
        raise UserError(
            f"checkpoint {folder} is of version {version} and this code reads version {VERSION}: "
            "go on with the Esper that wrote it, or start the run anew."
        )
    contents = {name: _bytes(folder, name) for name in (STATE, TENSORS)}
    files: Files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    if text != _manifest(files):  # this alone decides; what follows finds words for it
        raise _damaged(folder, _difference(manifest, files))
    try:
        return json.loads(contents[STATE]), safetensors.torch.load(contents[TENSORS])
    except (
        ValueError,
        KeyError,
        SafetensorError,
    ) as error:  # not a checkpoint of ours, yet with a manifest that fits it
        raise _damaged(folder, f"it cannot be read: {error}") from None


class Checkpoints:
    """The newest checkpoint of a run in `folder`, as `number-000000012/`; written by a thread, one at a time.

    A number stands for one state of the run and grows with it. Only one process may save to a folder. Use it as a
    context manager, or `close` it: what is still waiting is then written. A write that fails is said once, in a
    sentence, and the run goes on; later saves are tried again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._newest = max(_numbered(folder), default=-1)  # number: on the disk or handed over
        self._waiting: tuple[int, Any, dict[str, Tensor]] | None = None
        self._writing: Future[None] | None = None  # while the thread has work
        self._closed = False
        self._lock = threading.Lock()  # held for those four
        self._failed: str | None = None
        # One thread, from the first save on. Should nobody close this, the interpreter waits for its work at exit.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")

    @property
    def failed(self) -> str | None:
        """Why the last save that was tried is not on the disk, as a sentence; None when it is."""
        return self._failed

    def save(self, number: int, state: Any, tensors: Mapping[str, Tensor]) -> None:
        """Hand a checkpoint over and return at once. No tensor is copied: from now on nobody may change what it holds.

        While one is being written, only the newest of those handed over waits. Once that is whole, older ones are
        removed. A number that is on the disk already is not written again.

        Args:
            number: from 0, and not below those before, in `folder` too.
            state: as for `write`, and never changed from now on.
            tensors: as for `write`, and never changed from now on (new tensors may take their place in the mapping).
                A state or tensors that `write` refuses are told of like any other failure.

        Raises:
            UserError: `folder` holds a checkpoint of a higher number.
            ValueError: `number` is negative, or this is closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError(f"the checkpoints in {self._folder} are closed: save before that.")
            if number < 0:
                raise ValueError(f"a checkpoint's number is 0 or more, not {number}.")
            if number < self._newest:
                raise UserError(
                    f"checkpoint {number} cannot follow number {self._newest} in {self._folder}: "
                    "name a new folder, or go on from the newest."
                )
            self._newest = number
            self._waiting = (number, state, dict(tensors))
            if self._writing is None:
                self._writing = self._thread.submit(self._write_waiting)

    def flush(self) -> None:
        """Wait until everything handed over is on the disk, or has failed."""
        with self._lock:
            writing = self._writing
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Flush and end the thread. Closing twice does no harm."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest(self) -> tuple[int, Any, dict[str, Tensor]]:
        """Number, state and tensors of the newest checkpoint; those handed over are written first.

        Raises:
            UserError: there is none, or `read` refuses it.
        """
        self.flush()
        found = _numbered(self._folder)
        if not found:
            raise UserError(
                f"{self._folder} holds no checkpoint: name the folder of a run that saved one, or start the run anew."
            )
        number = max(found)
        return number, *read(found[number])

    def _write_waiting(self) -> None:
        """What the thread does: write until nothing waits."""
        while True:
            with self._lock:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._writing = None
                    return
            try:
                self._write(*job)
            except Exception as error:  # whatever it is, the run is worth more than its checkpoint
                first = self._failed is None
                reason = (isinstance(error, OSError) and error.strerror) or str(error)
                self._failed = (
                    f"checkpoint {job[0]} was not written to {self._folder} ({reason}): "
                    "mend that while the run goes on, and its next one is written."
                )
                if first:
                    with contextlib.suppress(OSError):  # standard error is gone: `failed` still tells
                        say(self._failed)
            else:
                self._failed = None

    def _write(self, number: int, state: Any, tensors: dict[str, Tensor]) -> None:
        """Write one and remove those before it; whatever has a temporary name is a dead process's or on its way out."""
        self._remove_partial()  # first, since the disk may be full of them
        folder = self._folder / f"number-{number:09d}"
        if not folder.exists():
            write(folder, state, tensors)
        for older, path in _numbered(self._folder).items():
            if older < number:  # renamed before it is taken apart: what has a final name is whole
                with contextlib.suppress(FileNotFoundError):  # another process took it away
                    path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial"))
        self._remove_partial()

    def _remove_partial(self) -> None:
        for path in self._folder.glob(".number-*.partial"):
            shutil.rmtree(path, ignore_errors=True)


def _numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by number; none where it is no folder."""
    found = ((re.fullmatch(r"number-(\d{9,})", path.name), path) for path in folder.glob("number-*"))
    return {int(match[1]): path for match, path in found if match}


def _state_text(state: Any) -> bytes:
    try:
        text = json.dumps(state, allow_nan=False, separators=(",", ":"))
        same = json.loads(text) == state
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the state is not JSON ({error}): hold finite numbers and plain values only.") from None
    if not same:
        raise ValueError("the state would not come back from JSON as it is: use string keys, and lists for tuples.")
    return text.encode()


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, no two in the same memory; copied only where they are not."""
    ours: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if name == "__metadata__":  # safetensors writes it, and then cannot read the file
            raise ValueError(f"no tensor may be called {name!r}: safetensors keeps that name to itself.")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise ValueError(
                f"tensor {name!r} is {tensor.layout}, {tensor.dtype} on {tensor.device}: a checkpoint takes dense ones "
                f"on the CPU of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}."
            )
        shares = tensor.untyped_storage().data_ptr() in seen
        if shares or not tensor.is_contiguous() or tensor.is_neg():  # a negative view is a flag, which no file has
            tensor = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        ours[name] = tensor
    return ours


def _measure(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file.

    Read in large pieces, since each may wait 5 ms for the interpreter's lock while the main thread computes: in pieces
    of 256 KiB, those of `hashlib.file_digest`, 100 MB took 4 s on two cores.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(2**24):
            size += len(piece)
            digest.update(piece)
    return size, digest.hexdigest()


def _manifest(files: Files) -> bytes:
    """The one form of the manifest."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    return (json.dumps({"version": VERSION, "files": listed}, indent=2) + "\n").encode()


def _bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise _damaged(folder, f"{name} is missing") from None
    except OSError as error:
        raise _damaged(folder, f"{name} cannot be read: {error.strerror}") from None


def _difference(manifest: Any, files: Files) -> str:
    """The first thing in which the manifest differs from the files that are there."""
    try:
        for name, (size, digest) in files.items():
            listed = manifest["files"][name]
            if listed["bytes"] != size:
                return f"{name}: {size} bytes instead of {listed['bytes']}"
            if listed["sha256"] != digest:
                return f"{name}: checksum differs"
    except (KeyError, TypeError, IndexError):
        return f"{MANIFEST} does not list the files"
    return f"{MANIFEST} is not in the form that it was written in"


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"checkpoint {folder} is damaged ({what}): restore it from a copy, or start the run anew.")
