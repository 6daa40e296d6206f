"""Journal: an append-only file of JSON lines that survives its process; an unfinished last line is cut off."""

import errno
import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from esper.platform.errors import in_a_sentence
from esper.platform.storage import naming

Entry = dict[str, Any]


class Journal:
    """The journal in a file, written by one process, a thread at a time.

    `entries` are those found. Of entries with one `identity` only the first is kept; identity None keeps all. Raises
    UserError where a line before the last is damaged.
    """

    def __init__(self, path: Path, identity: Callable[[Entry], Hashable] = lambda entry: None) -> None:
        self.path, self._identity = path, identity
        path.parent.mkdir(parents=True, exist_ok=True)
        self.entries, whole = _read(path)
        self._known = {identity(entry) for entry in self.entries} - {None}
        self.file = path.open("ab", buffering=0)
        self.file.truncate(whole)

    def add(self, entry: Entry) -> bool:
        """Append; False for a known identity or a closed journal. After an OSError nothing is written."""
        identity = self._identity(entry)
        if self.file.closed or identity in self._known:
            return False
        self.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")  # NaN stays NaN: only Python reads this
        self._known |= {identity} - {None}
        return True

    def write(self, lines: bytes) -> None:
        """Append whole lines by one call, whatever their identity; after an OSError none is written."""
        with naming(self.path):
            before = os.fstat(self.file.fileno()).st_size
            try:
                if self.file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self.file.truncate(before)
                raise

    def close(self) -> None:
        self.file.close()


def read_entries(path: Path) -> list[Entry]:
    """The whole entries; none without a file. Raises UserError where it is unreadable or damaged."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Entry], int]:
    """The entries, and the whole lines' length in bytes."""
    with in_a_sentence(f"{path} cannot be read", "make it a file that may be read"):
        if not path.exists():
            return [], 0
        content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        with in_a_sentence(f"{path} is damaged in line {number}", "restore it from a copy, or delete that line"):
            entries.append({} | json.loads(line))
    return entries, whole
