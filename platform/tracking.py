"""MLflow tracking that never holds up or stops a run, and loses nothing.

A `Tracker` is one MLflow run. Everything goes to `FOLDER/tracking.jsonl` first; a thread sends from there what the
store lacks (`platform/tracking_sync.py`), for as long as the tracker is open. What is left then is sent by the next
tracker of the same run, or by `sync`.
"""

import contextlib
import json
import re
import threading
import time
import uuid
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from esper.platform.console import say
from esper.platform.journal import Entry, Journal
from esper.platform.tracking_store import is_server, shown, tracking_uri, ui_command
from esper.platform.tracking_sync import JOURNAL, Delivery, sync, synced

__all__ = ["JOURNAL", "Status", "Tracker", "flatten", "milliseconds", "new_key", "sync", "synced"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

READY_SECONDS = 30  # the longest that anyone waits for the first try to connect: MLflow's import, a first migration
CLOSE_SECONDS, AWAY_SECONDS = 60, 15  # likewise at a run's end; of a store that has just taken nothing
VALUE_LENGTH, TAG_LENGTH, KEY_LENGTH = 6000, 8000, 250  # MLflow's own limits


class Tracker:
    """One MLflow run, begun or gone on with; written to from any thread without waiting. Best used in a `with` block.

    Args:
        folder: the run's, in which one tracker may be open.
        experiment: the group of runs it belongs to, made where it does not exist.
        run_name: how the UI calls it.
        key: of the run (`new_key`), in whatever store; where the store has it already, it is gone on with.
        tags: what the UI filters by (arm, seed, preset, git commit).
        params: the configuration; nested mappings become dotted keys (`host.n_layer`).
        parent: of the run this one is a child of.
        system_metrics: let MLflow watch this machine (processor, memory, disk, network, GPU) under `system/`.

    Raises:
        OSError: the journal cannot be opened.
        UserError: it is damaged, or the store's file is in a place that MLflow cannot name.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        run_name: str,
        *,
        key: str,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        parent: "Tracker | None" = None,
        system_metrics: bool = False,
    ) -> None:
        self.uri = tracking_uri()
        self._id = {"experiment": experiment, "key": key}
        self._folder = folder.absolute()
        self._journal = Journal(folder / JOURNAL, _identity)
        self._entries = list(self._journal.entries)
        self._unwritten: list[Entry] = []  # what a full disk did not take
        self._lock = threading.Lock()
        self._open, self._told = True, False
        self._delivery = Delivery(folder, self._entries, self.uri, system_metrics=system_metrics)
        labels = {name: str(value)[:TAG_LENGTH] for name, value in (tags or {}).items()}
        described = {"name": run_name, "tags": labels, "params": flatten(params or {})}
        self._record("run", **self._id, **described, parent=parent and parent._id, at=milliseconds())
        self._delivery.start(run_name)

    def log(self, metrics: Mapping[str, float], step: int, at: int | None = None) -> None:
        """Record `metrics` at `step`, with one time stamp for all keys: `at` in milliseconds, or this call's.

        A point whose keys and step are in the journal already is the same point: it is not recorded again.
        """
        values = {key: float(value) for key, value in metrics.items()}
        self._record("point", step=int(step), at=milliseconds() if at is None else at, metrics=values)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Keep a file, or a folder's files, with the run, under `folder` there."""
        whole = Path(path).absolute()
        kept = whole.relative_to(self._folder) if whole.is_relative_to(self._folder) else whole
        self._record("artifact", path=str(kept), folder=folder)

    def tag(self, key: str, value: object) -> None:
        """Set a tag that is known only now, such as the outcome."""
        self._record("tag", key=key, value=str(value)[:TAG_LENGTH])

    def log_input(self, name: str, source: str, digest: str, profile: Mapping[str, Any] | None = None) -> None:
        """Name the data set that the run reads: its path or address, a fingerprint of its content, what else is known.

        MLflow takes 36 characters of the fingerprint.
        """
        self._record("input", name=name, source=source, digest=digest, profile=dict(profile or {}))

    def close(self, status: Status = "FINISHED", seconds: float | None = None, *, ended: int | None = None) -> bool:
        """End the run, `ended` at a time in milliseconds or now, and wait for the store for at most `seconds`.

        Returns:
            whether the store has had everything; nothing is said where it has not. A second call is idle.
        """
        if self._open:
            self._record("end", status=status, at=milliseconds() if ended is None else ended)
            self._open = False
            longest = AWAY_SECONDS if self._delivery.failing else CLOSE_SECONDS
            self._delivery.finish(longest if seconds is None else seconds)
            self._journal.close()
        return self._delivery.complete and not self._unwritten

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, waiting for the first try to connect where needed; None where there is none (yet)."""
        self._delivery.tried.wait(READY_SECONDS)
        return self._delivery.run_id

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment, likewise."""
        self._delivery.tried.wait(READY_SECONDS)
        return self._delivery.experiment_id

    @property
    def where(self) -> str:
        """How to look at the run: the command that opens the UI, or the page on the server."""
        if self.run_id is None:
            return "not tracked"
        if is_server(self.uri):
            return f"{shown(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return ui_command(self.uri)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        taken = self.close("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")
        if not taken and not self._delivery.given_up:
            say(f"MLflow at {shown(self.uri)} has not had everything: what is left is sent when the run is resumed.")

    def _record(self, kind: str, **entry: Any) -> None:
        """Write an entry to the journal, after those that a full disk did not take; MLflow has it from there."""
        with self._lock:
            if not self._open:
                return
            self._unwritten.append({"kind": kind, **entry})
            try:
                while self._unwritten:
                    if self._journal.add(self._unwritten[0]):
                        self._entries.append(self._unwritten[0])
                    del self._unwritten[0]
            except OSError as error:
                if not self._told:
                    reason = error.strerror or error
                    say(f"{self._journal.path} cannot be written ({reason}): make room, or MLflow lacks these points.")
                self._told = True
        self._delivery.wake()


def new_key() -> str:
    """A key that no other run has."""
    return uuid.uuid4().hex


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and texts, cut to what MLflow takes; other values than texts as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            flat[re.sub(r"[^\w\-. /:]", "_", name)[:KEY_LENGTH]] = text[:VALUE_LENGTH]
    return flat


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return int(time.time() * 1000)


def _identity(entry: Entry) -> Hashable:
    """What tells a point or an input from others; headers, tags, artifacts and ends count each time."""
    with contextlib.suppress(KeyError, TypeError):
        if entry["kind"] == "point":
            return "point", entry["step"], frozenset(entry["metrics"])
        if entry["kind"] == "input":
            return "input", entry["name"], entry["digest"]
    return None
