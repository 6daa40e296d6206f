"""Files that are whole or absent: written beside their place, synced, and renamed."""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper.platform.errors import UserError


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name `path` alone: a failed write names no file, a rename two."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        del error.filename2
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file and its folders, synced; raises OSError naming `path` and leaves no partial file."""
    partial = _beside(path)
    with naming(path):
        standing = next(parent for parent in path.absolute().parents if parent.exists())
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        for parent in path.absolute().parents:  # the new names, up to the folder that stood before
            _sync_names(parent)
            if parent == standing:
                break


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str, example: str) -> Any:
    """A user's JSON file; raises UserError, which calls it `what` and asks for `example`, where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror}): name {example}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON ({error}): mend it, or name another.") from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that becomes `path` when the block ends without an error; of two at once the first wins.

    Raises UserError where it cannot be written.
    """
    partial = _beside(path.absolute())
    try:
        partial.mkdir(parents=True)
        yield partial
        with contextlib.suppress(OSError):  # another process finished first
            partial.rename(path)
        if not path.exists():
            raise OSError(f"could not move {partial} to {path}")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written ({reason}): name one where you may write.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, released however the process ends; raises BlockingIOError where it is held and not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:  # closing it lets go of it
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only process in a folder; raises UserError where another is."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(f"another process works in {folder}: wait for its end, or stop it first.") from None
        yield


def check_unused(out: Path) -> None:
    """Raise UserError unless `out` is new or an empty folder, and writable."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a new or empty folder.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} already holds another run: name a new or empty folder, or delete it first.")
    _check_writable(out)


def check_new_file(out: Path) -> None:
    """Raise UserError where `out` exists or cannot be made."""
    if out.exists():
        raise UserError(f"--out {out} is there already: name a new file.")
    _check_writable(out)


def _check_writable(out: Path) -> None:
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        obstacle = "read-only" if parent.is_dir() else "a file"
        raise UserError(f"--out {out} cannot be made ({parent} is {obstacle}): name a place where you may write.")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
