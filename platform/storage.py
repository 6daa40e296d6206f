"""Files that are whole or absent: written beside their place, synced, and renamed."""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from esper.platform.errors import UserError, reason


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
    """Write a file and its folders; raises OSError naming `path` and leaves no partial file."""
    partial = _beside(path)
    with naming(path):
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
        try:
            partial.rename(path)
        except OSError:
            if not (path.is_dir() and any(path.iterdir())):
                raise
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}): name one where you may write.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, released however the process ends; raises UserError where it is held and not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:  # closing it lets go of it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process works in {path.parent}: wait for its end, or stop it first.") from None
        yield


def alone(folder: Path) -> AbstractContextManager[None]:
    """Be the only process in a folder; raises UserError where another is."""
    return locked(folder / ".lock", wait=False)


def check_unused(out: Path, *, file: bool = False) -> None:
    """Raise UserError unless `out` is new, or else an empty folder, and may be written."""
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if file and out.exists():
        problem = "is there already"
    elif not parent.is_dir():
        problem = f"cannot be made, for {parent} is a file"
    elif out.is_dir() and any(out.iterdir()):
        problem = "already holds another run"
    elif not os.access(parent, os.W_OK):
        problem = f"cannot be made, for {parent} is read-only"
    else:
        return
    what = "file" if file else "or empty folder"
    raise UserError(f"--out {out} {problem}: name a new {what} where you may write.")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
