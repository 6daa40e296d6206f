"""MLflow tracking that never holds up or stops a run, and loses nothing.

A `Tracker` is one MLflow run. Everything goes to `FOLDER/tracking.jsonl` first, as entries of six kinds: `run` (how it
is called; one for each start), `point`, `tag`, `artifact`, `input` and `end`. A thread sends the store what it lacks
for as long as the tracker is open; the next tracker of the same run, or `sync`, sends what is left, to any store at any
time: `tracking.sent.json` counts the entries that each store has had, a store has the run under its key, and a point
carries its own time stamp, so that it is there once however often it is sent.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, TypeAdapter

from esper.platform.console import say
from esper.platform.deadline import within
from esper.platform.errors import reason, shown
from esper.platform.journal import Entry, Journal, read_entries
from esper.platform.storage import write_json
from esper.platform.tracking_store import StoredRun, runs_page, tracking_uri

JOURNAL, SENT = "tracking.jsonl", "tracking.sent.json"
CONNECT_SECONDS, CALL_SECONDS = 60, 20  # the longest that one try to connect, or one request, may take
PAUSE_SECONDS = 1  # between two tries
READY_SECONDS = 30  # the longest that anyone waits for a run's id: MLflow's import, a first migration
CLOSE_SECONDS, AWAY_SECONDS = 60, 5  # likewise at a run's end; of a store that takes nothing
SYNC_SECONDS = 60
VALUE_LENGTH = 6000  # of a parameter: MLflow's limit

Status = Literal["FINISHED", "FAILED", "KILLED"]

_away: set[str] = set()  # the stores that take nothing at the moment
_telling = threading.Lock()


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """One MLflow run, begun or gone on with; written to from any thread without waiting. Best used in a `with` block.

    Its `key` tells it from all others; a run that the store has under it already is gone on with. `folder` is the
    run's, in which one tracker may be open. `params` that are nested become dotted keys (`host.n_layer`). With
    `system_metrics`, MLflow watches this machine under `system/`. Raises UserError where the journal is damaged, or
    the store's file in a place that MLflow cannot name, and OSError where the journal cannot be opened.
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
        self.uri, self._folder = tracking_uri(), folder.absolute()
        self._id = {"experiment": experiment, "key": key}
        self._journal = Journal(folder / JOURNAL, _identity)
        self._entries = list(self._journal.entries)
        self._lock, self._told = threading.Lock(), False
        self._sender = _Sender(self._folder, self._entries, self.uri, system_metrics=system_metrics)
        described = {"name": run_name, "params": flatten(params or {}), "parent": parent and parent._id}
        texts = {name: str(value) for name, value in (tags or {}).items()}
        self._record("run", **self._id, **described, tags=texts, at=milliseconds())
        self._sender.start()

    def log(self, metrics: Mapping[str, float], step: int, at: int | None = None) -> None:
        """Record `metrics` at `step`, with one time stamp for all keys: `at` in milliseconds, or this call's.

        A point whose keys and step are in the journal already is the same point: it is not recorded again. One that a
        full disk did not take is lost to MLflow until the caller records it again.
        """
        values = {key: float(value) for key, value in metrics.items()}
        self._record("point", step=int(step), at=milliseconds() if at is None else at, metrics=values)

    def artifact(self, path: Path) -> None:
        self._record("artifact", path=os.path.relpath(path, self._folder))

    def tag(self, key: str, value: object) -> None:
        """Set a tag that is known only now, such as the outcome."""
        self._record("tag", key=key, value=str(value))

    def log_input(self, name: str, source: str, digest: str, profile: Mapping[str, Any]) -> None:
        """Name the data set that the run reads: its place, its fingerprint (MLflow cuts it), and what is known."""
        self._record("input", name=name, source=source, digest=digest, profile=dict(profile))

    def close(self, status: Status = "FINISHED", seconds: float | None = None, *, ended: int | None = None) -> bool:
        """End the run, `ended` at a time in milliseconds or now, and wait for the store for at most `seconds`.

        Returns whether the store has had everything; nothing is said where it has not. A second call is idle.
        """
        if not self._journal.file.closed:
            self._record("end", status=status, at=milliseconds() if ended is None else ended)
            with self._lock:
                self._journal.close()
            longest = AWAY_SECONDS if self.uri in _away else CLOSE_SECONDS
            self._sender.finish(longest if seconds is None else seconds)
        return self._sender.complete

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, waiting for the first tries to connect where needed; None where there is none."""
        self._sender.tried.wait(READY_SECONDS)
        return self._sender.info and self._sender.info.run_id

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment, likewise."""
        return self.run_id and self._sender.info.experiment_id

    @property
    def where(self) -> str:
        return f"{runs_page(self.uri, self.experiment_id)}/{self.run_id}" if self.run_id else "not tracked"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if not self.close("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED"):
            say(f"MLflow at {shown(self.uri)} has not had everything: what is left is sent when the run is resumed.")

    def _record(self, kind: str, **values: Any) -> None:
        """Write an entry, and say once if it cannot be written; idle once closed."""
        entry = {"kind": kind, **values}
        with self._lock:
            try:
                if self._journal.add(entry):
                    self._entries.append(entry)
            except OSError as error:
                if not self._told:
                    say(f"{self._journal.path} cannot be written ({reason(error)}): make room, or MLflow lacks points.")
                self._told = True
        self._sender.more.set()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and texts, cut to what MLflow takes; other values than texts as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[f"{prefix}{key}"] = text[:VALUE_LENGTH]
    return flat


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return int(time.time() * 1000)


def sync(folder: Path, uri: str, seconds: float = SYNC_SECONDS) -> bool:
    """Send a store what it lacks of a run that no tracker is open for; whether it has all after `seconds` at most.

    Raises UserError where the journal is damaged.
    """
    sender = _Sender(folder, read_entries(folder / JOURNAL), uri)
    if not sender.complete:
        sender.start()
        sender.finish(seconds)
    return sender.complete


def synced(folder: Path, uri: str) -> bool:
    """Whether a store has had all of a run's journal, and that has an end: no process died before it."""
    entries = read_entries(folder / JOURNAL)
    return bool(entries) and entries[-1].get("kind") == "end" and _sent(folder).get(shown(uri)) == len(entries)


class _Sender(threading.Thread):
    """Sends a run's entries, which may grow, to a store, in order; what fails is tried again, over a new connection."""

    def __init__(self, folder: Path, entries: Sequence[Entry], uri: str, *, system_metrics: bool = False) -> None:
        super().__init__(name=f"tracking {folder.name}", daemon=True)
        self.info: Any = None  # MLflow's RunInfo, once connected
        self.tried, self.more = threading.Event(), threading.Event()  # to connect (in vain, twice); entries
        self._folder, self._entries, self._uri = folder, entries, uri
        self._count = min(_sent(folder).get(shown(uri), 0), len(entries))
        self._stored: StoredRun | None = None  # while connected
        self._watched, self._monitor = system_metrics, None
        self._last, self._over = threading.Event(), threading.Event()  # no more entries; no more tries

    @property
    def complete(self) -> bool:
        return self._count >= len(self._entries)

    def finish(self, seconds: float) -> None:
        """There will be no more: let the thread end, once all is sent or `seconds` are over."""
        self._last.set()
        self.more.set()
        self.join(seconds)
        self._over.set()

    def run(self) -> None:
        failures = 0
        while not (self._over.is_set() or (self._last.is_set() and self.complete)):
            self.more.clear()
            try:
                whole, failures = self._send_all(), 0
            except Exception as error:
                whole, failures, self._stored = False, failures + 1, None  # the store may have been made anew
                if failures > 1:
                    self.tried.set()
                    _tell(self._uri, error)
            if not whole:
                self._over.wait(PAUSE_SECONDS)
            elif not self._last.is_set():
                self.more.wait()
        if self._monitor is not None:
            with contextlib.suppress(TimeoutError):
                within(CALL_SECONDS, self._monitor.finish)

    def _send_all(self) -> bool:
        """Connect where that is to be done, and send what there is; False while the run's parent is not there."""
        while not self.complete and not self._over.is_set():
            if self._stored is None:
                stored = within(CONNECT_SECONDS, partial(StoredRun.find, self._uri, self._entries[0]))
                if stored is None:
                    return False
                self._stored, self.info = stored, stored.info
                self._count = 0 if stored.made else self._count
                self.tried.set()
                if self._watched and self._monitor is None:
                    self._monitor = within(CALL_SECONDS, stored.watch_machine)
            left = self._entries[self._count :]
            self._count += within(CALL_SECONDS, partial(self._stored.send, left, self._folder))
            _tell(self._uri, None)
            with contextlib.suppress(OSError):  # a full disk: sent again, it is still there once
                write_json(self._folder / SENT, {**_sent(self._folder), shown(self._uri): self._count})
        return True


def _tell(uri: str, error: Exception | None) -> None:
    """Say that a store takes nothing, or takes something again: once for all runs."""
    with _telling:
        known = uri in _away
        (_away.discard if error is None else _away.add)(uri)
    if error is None and known:
        say(f"MLflow at {shown(uri)} is back: what was kept is being sent.")
    elif error is not None and not known:
        say(
            f"MLflow at {shown(uri)} takes nothing ({reason(error)}): the run goes on, and {JOURNAL} keeps all for "
            "later; where that lasts, check MLFLOW_TRACKING_URI, then resume the run."
        )


def _sent(folder: Path) -> dict[str, int]:
    """Store → entries that it has had; none where that cannot be read: to send them again changes nothing."""
    try:
        return TypeAdapter(dict[str, NonNegativeInt]).validate_json((folder / SENT).read_bytes())
    except (OSError, ValueError):
        return {}


def _identity(entry: Entry) -> Hashable:
    """What tells a point from others; every other entry counts each time."""
    match entry:
        case {"kind": "point", "step": int(step), "metrics": dict(metrics)}:
            return step, frozenset(metrics)
    return None
