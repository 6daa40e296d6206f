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


def cache(what: str) -> Path:
    """The folder of what runs share: below `ESPER_CACHE`, by default `~/.cache/esper`."""
    folder = os.environ.get("ESPER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "esper"
    return Path(folder).expanduser() / what


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file and its folders; raises OSError naming `path` and leaves no partial file."""
    partial = beside(path)
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
    """Yield a folder that becomes `path` if the block ends well; of two the first wins. UserError: not writable."""
    partial = beside(path.absolute())
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
def alone(folder: Path) -> Iterator[None]:
    """Be the only process in a folder, until this one ends it or itself; raises UserError where another is."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:  # closing it lets go of it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works in {folder}: wait for its end, or stop it first.") from None
        yield


def check_unused(out: Path, *, file: bool = False) -> None:
    """Raise UserError unless `out` is new, or else an empty folder, and may be written."""
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if out.exists() and (file or not out.is_dir() or any(out.iterdir())):
        problem = "is a file" if out.is_file() else "already holds another run"
    elif not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = f"cannot be made, for {parent} is {'read-only' if parent.is_dir() else 'a file'}"
    else:
        return
    raise UserError(f"--out {out} {problem}: name a new {'file' if file else 'or empty folder'} where you may write.")


def beside(path: Path) -> Path:
    """A place for what is to be renamed to `path` once it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
