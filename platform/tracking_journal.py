"""Journal: the points of a run in a file, a JSON line each, so that they outlive process and server.

A line is written in one piece before its point is sent. What a crash has cut off is cut off for good when the file is
opened again; the points before it are whole, each with the time stamp that it had first.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from esper.platform.storage import write_text

JOURNAL, TRACKED = "points.jsonl", "tracked"  # in a run's folder: its points, and the store that has had everything


def tracked_by(folder: Path) -> str | None:
    """The MLflow store that has had everything of the run in a folder; None where none has."""
    path = folder / TRACKED
    return path.read_text(encoding="utf-8") if path.exists() else None


def note_tracked(folder: Path, uri: str) -> None:
    """Note that a store has had everything of the run in a folder."""
    write_text(folder / TRACKED, uri)


class Point(NamedTuple):
    """Metrics that belong to one step, made at one time (`at`, milliseconds)."""

    step: int
    at: int
    metrics: dict[str, float]


class Journal:
    """The journal in a file, which is made where there is none; threads may share one.

    Attributes:
        points: those found in the file.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.points, whole = _read(path)
        self._known = {_identity(point) for point in self.points}
        self._lock = threading.Lock()
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, whole)

    def add(self, point: Point) -> bool:
        """Append a point; False where one of the same keys and step is there already, or the journal is closed."""
        line = json.dumps(point._asdict()) + "\n"  # NaN stays NaN: only Python reads this
        with self._lock:
            if self._file is None or _identity(point) in self._known:
                return False
            _write(self._file, line.encode())
            self._known.add(_identity(point))
        return True

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None


def read_points(path: Path) -> list[Point]:
    """The whole points in a journal; none where there is no file."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Point], int]:
    """Its points, and the length in bytes of its whole lines."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    points = []
    for line in content[:whole].splitlines():
        try:
            entry: Mapping = json.loads(line)
            metrics = {str(key): float(value) for key, value in entry["metrics"].items()}
            points.append(Point(int(entry["step"]), int(entry["at"]), metrics))
        except (ValueError, TypeError, KeyError, AttributeError):  # what a loss of power may leave
            continue
    return points, whole


def _write(file: int, line: bytes) -> None:
    """Write a line in one piece, or nothing of it (a disk that is full takes a part)."""
    before = os.fstat(file).st_size
    try:
        if os.write(file, line) < len(line):
            raise OSError("the disk took only a part of a line")
    except OSError:
        os.ftruncate(file, before)
        raise


def _identity(point: Point) -> tuple[int, frozenset[str]]:
    return point.step, frozenset(point.metrics)
