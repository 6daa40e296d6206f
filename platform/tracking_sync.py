"""Brings a run's journal to an MLflow store: whatever that lacks, at any time, after any death.

`tracking.jsonl` in the run's folder holds entries of six kinds: `run` (how it is called; one for each start), `point`,
`tag`, `artifact`, `input` and `end`. `tracking.sent.json` beside it holds how many of them each store has had. A store
has the run under its key. A point carries its own time stamp, so it is there once however often it is sent.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from esper.platform import tracking_store
from esper.platform.console import say
from esper.platform.deadline import within
from esper.platform.journal import Entry, read_entries
from esper.platform.storage import write_json
from esper.platform.tracking_store import ExperimentDeleted, NoParentYet, Place, reason, shown, tracking_uri

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

JOURNAL, SENT = "tracking.jsonl", "tracking.sent.json"
CONNECT_SECONDS, CALL_SECONDS = 60, 20  # the longest that one try to connect, or one request, may take
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10  # between two tries, doubling
SYNC_SECONDS = 60
WATCH_SECONDS = 10  # between two looks at whether MLflow still watches the machine
MONITOR = "SystemMetricsMonitor"  # the name of its thread

_said: set[str] = set()  # what was said of stores: once a process, not once a run
_outages: dict[str, "Outage"] = {}  # by store


def sync(folder: Path, uri: str | None = None, seconds: float = SYNC_SECONDS) -> bool:
    """Send a store (none: the one in use) what it lacks of a run that no tracker is open for, for at most `seconds`.

    Returns:
        whether it has had everything then.

    Raises:
        UserError: the journal is damaged.
    """
    delivery = Delivery(folder, read_entries(folder / JOURNAL), uri or tracking_uri())
    if not delivery.complete:
        delivery.start(folder.name)
        delivery.finish(seconds)
    return delivery.complete


def synced(folder: Path, uri: str) -> bool:
    """Whether a store has had all of a run's journal, and that has an end: no process died before it."""
    entries = read_entries(folder / JOURNAL)
    return bool(entries) and entries[-1].get("kind") == "end" and _marks(folder).get(shown(uri)) == len(entries)


class Delivery:
    """A thread that sends a run's entries, which may grow, to a store, in order, from where that store stands.

    Attributes:
        run_id: MLflow's, once connected; `experiment_id` too.
        tried: the first try to connect is over.
        failing: nothing came of the last two tries.
        given_up: the store refuses for good, and why has been said.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], uri: str, *, system_metrics: bool = False) -> None:
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.tried = threading.Event()
        self.failing = self.given_up = False
        self._folder, self._entries, self._uri = folder, entries, uri
        self._outage = _outages.setdefault(uri, Outage(uri))
        self._count = min(_marks(folder).get(shown(uri), 0), len(entries))
        self._place: Place | None = None  # while connected
        self._watched = system_metrics
        self._monitor: SystemMetricsMonitor | None = None
        self._wake, self._last, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def complete(self) -> bool:
        """Whether the store has had every entry there is."""
        return self._count >= len(self._entries)

    def start(self, name: str) -> None:
        """Start the thread, which ends with the process."""
        self._thread.name = f"tracking {name}"
        self._thread.start()

    def wake(self) -> None:
        """There are more entries."""
        self._wake.set()

    def finish(self, seconds: float) -> None:
        """There will be no more: let the thread end, once all is sent or `seconds` are over."""
        self._last.set()
        self._wake.set()
        self._thread.join(seconds)
        self._stop.set()

    def _work(self) -> None:
        pause, failures = PAUSE_SECONDS, 0
        while not self._stop.is_set() and not self.given_up:
            self._wake.clear()
            began = time.monotonic()
            try:
                self._send_all()
            except Exception as error:
                failures += 1
                self.failing = failures > 1
                connected, self._place = self._place is not None, None  # the store may have been made anew
                if tracking_store.is_final(error) and (failures > 1 or not connected):
                    self._give_up(error)
                elif self.failing and not isinstance(error, NoParentYet):
                    self._outage.failed(began, error)
                if not isinstance(error, NoParentYet):
                    self.tried.set()
                hurried = self._last.is_set()
                (self._stop if hurried else self._last).wait(PAUSE_SECONDS if hurried else pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause, failures, self.failing = PAUSE_SECONDS, 0, False
            self.tried.set()
            if self._last.is_set() and self.complete:
                break
            self._wake.wait(WATCH_SECONDS if self._watched else None)
        self._end_watch()

    def _send_all(self) -> None:
        """Connect where that is to be done, and send what there is."""
        if not self._entries:
            return
        if self._place is None:
            self._end_watch()
            place = within(CONNECT_SECONDS, partial(tracking_store.find_run, self._uri, self._entries[0]))
            self._place, self.run_id, self.experiment_id = place, place.run_id, place.experiment_id
            if place.fresh:
                self._count = 0
        place = self._place
        if self._watched and not self._last.is_set():
            self._watch(place)
        while not self.complete and not self._stop.is_set():
            left = self._entries[self._count :]
            self._count += within(CALL_SECONDS, partial(tracking_store.send, place, left, self._folder))
            self._outage.answered()
            with contextlib.suppress(OSError):  # a full disk: sent again, it is still there once
                write_json(self._folder / SENT, {**_marks(self._folder), shown(self._uri): self._count})

    def _watch(self, place: Place) -> None:
        """Let MLflow watch the machine, unless it does: a server's outage ends its thread."""
        if any(thread.name == MONITOR for thread in threading.enumerate()):
            return
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        def start() -> SystemMetricsMonitor:
            place.client.get_run(place.run_id)  # where the store does not answer, the monitor would count from 0 again
            monitor = SystemMetricsMonitor(place.run_id, resume_logging=True, tracking_uri=self._uri)
            monitor.start()
            return monitor

        self._monitor = within(CALL_SECONDS, start)

    def _end_watch(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            with contextlib.suppress(TimeoutError):
                within(CALL_SECONDS, monitor.finish)

    def _give_up(self, error: Exception) -> None:
        """Say why, once a process."""
        self.given_up = True
        if f"{self._uri} {error}" in _said:
            return
        _said.add(f"{self._uri} {error}")
        store, kept = shown(self._uri), f"what it lacks stays in the run's {JOURNAL}"
        if isinstance(error, ExperimentDeleted):
            restore = f"`MLFLOW_TRACKING_URI={store} mlflow experiments restore -x {error.experiment_id}`"
            say(
                f"MLflow's experiment {error.name} at {store} has been deleted: {kept}; get it back with {restore}, "
                "then resume the run."
            )
        else:
            say(
                f"MLflow at {store} cannot be used ({reason(error)}): {kept}; check MLFLOW_TRACKING_URI, or unset it "
                "for a local file."
            )


class Outage:
    """Whether a store takes anything at the moment: told once for all runs."""

    def __init__(self, uri: str) -> None:
        self._store = shown(uri)
        self._lock = threading.Lock()
        self._down = False
        self._answered = -float("inf")

    def failed(self, began: float, error: Exception) -> None:
        """Nothing came of a request made at `began` (`time.monotonic`)."""
        with self._lock:
            if self._down or began < self._answered:
                return
            self._down = True
        say(
            f"MLflow at {self._store} takes nothing at the moment ({reason(error)}): the run goes on, and what is kept "
            "in its journal is sent later."
        )

    def answered(self) -> None:
        """A request went through."""
        with self._lock:
            self._answered = time.monotonic()
            was_down, self._down = self._down, False
        if was_down:
            say(f"MLflow at {self._store} is back: what was kept is being sent.")


def _marks(folder: Path) -> dict[str, int]:
    """Store → entries that it has had; none where that cannot be read: to send them again changes nothing."""
    try:
        marks = json.loads((folder / SENT).read_bytes())
        return {store: count for store, count in marks.items() if isinstance(count, int) and count >= 0}
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}
