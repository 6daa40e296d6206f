"""MLflow tracking that never holds up or stops a run.

A `Tracker` is one MLflow run. Its thread imports MLflow (seconds), connects, and sends what is put into its queue, in
order; the training thread only ever appends to that queue. A server that cannot be reached costs one sentence, and the
tracker does nothing from then on.

With a journal nothing is lost: each point is first a line in a file, the thread tries for as long as the tracker is
open, and the next tracker of the same run sends the whole file again. A point carries its own time stamp, so the SQL
stores of MLflow have it once however often it comes.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from esper.platform.console import say
from esper.platform.machine_watch import MachineWatch
from esper.platform.tracking_errors import ExperimentDeleted, NoRun, NoRunYet, Outage, is_final
from esper.platform.tracking_journal import Journal, Point
from esper.platform.tracking_store import (
    KEY,
    MODEL,
    connect,
    experiment_of,
    is_server,
    log_artifact,
    probe,
    reason,
    register_model,
    run_with_key,
    shown,
    tracking_uri,
    ui_command,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
Job = Callable[["MlflowClient", str], object]  # does its one thing with the client and the run's id

READY_SECONDS = 60  # the longest that anyone waits for the first try to connect: MLflow's import, a first migration
RETRY_SECONDS = 60  # a server that restarts in mid-run has this long, where there is no journal
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10  # between two tries, doubling
CLOSE_SECONDS = 30
WATCH_SECONDS = 10  # between two looks at whether MLflow still watches the machine
VALUE_LENGTH, TAG_LENGTH, KEY_LENGTH, PARAMS_A_BATCH = 6000, 8000, 250, 100  # MLflow's own limits
METRICS_A_BATCH, DIGEST_LENGTH = 1000, 36  # likewise

_already_said: set[str] = set()  # stores whose absence was reported: once a process, not once a trial
_outages: dict[str, "Outage"] = {}  # by store, of trackers with a journal


class Tracker:
    """One MLflow run, written to from any thread without waiting. Use `Tracker.start`, best in a `with` block."""

    def __init__(self, uri: str, journal: Journal | None = None) -> None:
        self.uri = uri
        self._journal = journal
        self._outage = _outages.setdefault(uri, Outage(uri))
        self._jobs: SimpleQueue[Job | Point | None] = SimpleQueue()
        self._ahead: list[Job | Point | None] = []  # taken from the queue, and not done yet
        self._ready = threading.Event()  # the first try to connect is over
        self._hurry = threading.Event()  # somebody waits for the end
        self._stop = threading.Event()  # nobody waits for it any more
        self._off = False
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._run_id: str | None = None
        self._watch: MachineWatch | None = None
        self._thread: threading.Thread | None = None
        self._taken = False

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        *,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        parent: "str | Tracker | None" = None,
        key: str | None = None,
        journal: Path | None = None,
        system_metrics: bool = False,
    ) -> "Tracker":
        """Begin a run; returns at once, while the connection is made in the background.

        Args:
            experiment: The group of runs it belongs to, made where it does not exist.
            run_name: How the UI calls it.
            tags: What the UI filters by (arm, seed, preset, git commit).
            params: The configuration; nested mappings become dotted keys (`host.n_layer`).
            parent: `run_id` of the run this one is a child of, or that run's tracker, which may still be connecting.
            key: what tells this run from all others (`new_key`). Where the store has a run with it already, that one is
                gone on with: a run that is resumed, even after a death before MLflow had answered, stays one run.
            journal: File that every point is written to first; needs a `key`. What is in it already is sent again.
            system_metrics: Let MLflow watch this machine (processor, memory, disk, network, GPU) under `system/`.

        Raises:
            OSError: the journal cannot be written.
        """
        if journal is not None and key is None:
            raise ValueError("a journal belongs to the run of a key: give both")
        tracker = cls(tracking_uri(), Journal(journal) if journal else None)
        began = milliseconds()
        labels = {key: str(value)[:TAG_LENGTH] for key, value in (tags or {}).items()}
        if isinstance(parent, str) and parent:
            labels["mlflow.parentRunId"] = parent
        flat = flatten(params or {})
        tracker._watch = MachineWatch(tracker.uri) if system_metrics else None

        def begin() -> None:
            if isinstance(parent, Tracker):
                labels["mlflow.parentRunId"] = parent._id_for_child()
            tracker._connect(experiment, run_name, labels, flat, began, key)

        def work() -> None:
            try:
                tracker._try(begin, seconds=0)
                tracker._ready.set()
                tracker._work()
            finally:
                tracker._ready.set()
                if tracker._watch is not None:
                    tracker._watch.end(wait=False)

        if tracker._journal is not None:
            for point in tracker._journal.points:
                tracker._jobs.put(point)
        tracker._thread = threading.Thread(target=work, name=f"tracking {run_name}", daemon=True)
        tracker._thread.start()
        return tracker

    def log(self, metrics: Mapping[str, float], step: int, at: int | None = None) -> None:
        """Record `metrics` at `step`: one time stamp for all keys.

        With a journal, a point whose keys and step are in it already is the same point: it is not recorded again.

        Args:
            metrics: values by key.
            step: that they belong to.
            at: time stamp in milliseconds, this call's if none is given. A point that is sent again with its own is the
                same point, so a resumed training may send all it knows.
        """
        if self._thread is None:
            return
        now = milliseconds() if at is None else at
        point = Point(step, now, {key: float(value) for key, value in metrics.items()})
        if self._journal is None or self._noted(self._journal, point):
            self._put(point)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Keep a file, or a folder's files, with the run, under `folder` there; it must stay in place until `close`."""
        self._put(lambda client, run_id: log_artifact(client, run_id, Path(path), folder))

    def tag(self, key: str, value: object) -> None:
        """Set a tag that is known only now, such as the outcome."""
        self._put(lambda client, run_id: client.set_tag(run_id, key, str(value)[:TAG_LENGTH]))

    def log_input(self, name: str, source: str, digest: str, profile: Mapping[str, Any] | None = None) -> None:
        """Name the data set that the run reads, as MLflow's UI shows and filters by.

        Args:
            name: of the data set.
            source: its path or address.
            digest: fingerprint of its content; MLflow takes 36 characters.
            profile: what else is known of it, such as its size.
        """

        def job(client: "MlflowClient", run_id: str) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            known = Dataset(
                name, digest[:DIGEST_LENGTH], "local", json.dumps({"uri": source}), profile=json.dumps(profile or {})
            )
            client.log_inputs(run_id, [DatasetInput(known, [InputTag("mlflow.data.context", "training")])])

        self._put(job)

    def register(self, model_name: str, folder: Path | str, tags: Mapping[str, Any] | None = None) -> None:
        """Keep a folder with the run under `model/`, and make it a version of a registered model.

        A run has one version of a model: once more replaces the files and sets the tags. Where the store has no
        registry, a sentence says so and the files are kept.
        """
        labels = {key: str(value) for key, value in (tags or {}).items()}

        def job(client: "MlflowClient", run_id: str) -> None:
            if not log_artifact(client, run_id, Path(folder), MODEL):
                return
            try:
                register_model(client, run_id, model_name, labels)
            except Exception as error:
                if not is_final(error):
                    raise
                say(f"MLflow could not register {model_name} ({reason(error)}): its files lie with the run instead.")

        self._put(job)

    def close(self, status: Status = "FINISHED", seconds: float = CLOSE_SECONDS, *, ended: int | None = None) -> bool:
        """End the run once everything has been sent, waiting for that for at most `seconds`. A second call is idle.

        A connection that is still being made (a short run, a busy machine) has its own `READY_SECONDS` first.

        Args:
            status: that the run ends with.
            seconds: the longest to wait.
            ended: time stamp of the run's end in milliseconds, this call's if none is given.

        Returns:
            whether MLflow has had everything. With a journal nothing is said where it has not: the points lie there,
            and the next tracker with this key and journal sends them.
        """
        if self._thread is None:
            return self._taken
        over = milliseconds() if ended is None else ended
        self._hurry.set()
        if (watch := self._watch) is not None:
            self._put(lambda client, run_id: watch.end(wait=True))
        self._put(lambda client, run_id: client.set_terminated(run_id, status, over))
        self._jobs.put(None)
        self._ready.wait(READY_SECONDS)
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._off:
            self._off = True
            if self._journal is None:
                say(f"MLflow at {shown(self.uri)} did not take the run's last records within {seconds:g} s: left out.")
        self._stop.set()
        self._thread = None
        if self._journal is not None:
            self._journal.close()
        return self._taken

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, waiting for the first try to connect where needed; None where there is none (yet)."""
        self._ready.wait(READY_SECONDS)
        return self._run_id

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment, likewise."""
        self._ready.wait(READY_SECONDS)
        return self._experiment_id

    @property
    def where(self) -> str:
        """How to look at the run: the command that opens the UI, or the page on the server."""
        run_id = self.run_id
        if run_id is None:
            return "not tracked"
        if is_server(self.uri):
            return f"{shown(self.uri).rstrip('/')}/#/experiments/{self._experiment_id}/runs/{run_id}"
        return ui_command(self.uri)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            taken = self.close("FINISHED")
        else:
            taken = self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        if self._journal is not None and not taken:
            say(f"MLflow at {shown(self.uri)} has not had everything: what is left is sent when the run is resumed.")

    def _put(self, job: Job | Point) -> None:
        """Queue a job, unless nobody will do it."""
        if not self._off and self._thread is not None:
            self._jobs.put(job)

    def _id_for_child(self) -> str:
        """The run's id, for the thread of a child."""
        if self.run_id is None:
            raise NoRun if self._off else NoRunYet
        return self.run_id

    def _connect(
        self,
        experiment: str,
        name: str,
        tags: dict[str, str],
        params: dict[str, str],
        began: int,
        key: str | None,
    ) -> None:
        """Import MLflow, find the store, make experiment and run; what a try before this one did is gone on with."""
        probe(self.uri)
        client = connect(self.uri)
        group = experiment_of(client, experiment, self.uri)
        self._experiment_id = group.experiment_id
        if group.lifecycle_stage == "deleted":
            raise ExperimentDeleted(group)
        tags = tags | ({KEY: key} if key is not None else {})
        before = run_with_key(client, group.experiment_id, key) if key is not None else None
        if before is None:
            run = client.create_run(group.experiment_id, start_time=began, tags=tags, run_name=name)
        else:
            run = before
            client.update_run(run.info.run_id, status="RUNNING")
        from mlflow.entities import Param, RunTag

        if before is not None and self._journal is not None:
            client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        pairs = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for first in range(0, len(pairs), PARAMS_A_BATCH):
            client.log_batch(run.info.run_id, params=pairs[first : first + PARAMS_A_BATCH])
        self._client, self._run_id = client, run.info.run_id

    def _work(self) -> None:
        """Send what is queued, until the end is."""
        self._keep_watch()
        while not self._stop.is_set():
            job = self._next()
            if job is None:
                self._taken = self._run_id is not None and not self._off
                return
            self._send(self._batch(job) if isinstance(job, Point) else job)

    def _next(self) -> Job | Point | None:
        """What is queued next, once something is."""
        if self._ahead:
            return self._ahead.pop()
        while self._watch is not None and self._watch.wanted:
            try:
                return self._jobs.get(timeout=WATCH_SECONDS)
            except Empty:
                self._keep_watch()
        return self._jobs.get()

    def _keep_watch(self) -> None:
        if self._watch is not None and self._client is not None and self._run_id is not None:
            self._watch.keep(self._client, self._run_id)

    def _batch(self, point: Point) -> Job:
        """One request for a point and those that wait right behind it."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        job: Job | Point | None = point
        while isinstance(job, Point):
            metrics += [Metric(key, value, job.at, job.step) for key, value in job.metrics.items()]
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            if not isinstance(job, Point) or len(metrics) + len(job.metrics) > METRICS_A_BATCH:
                self._ahead.append(job)
                break
        return lambda client, run_id: client.log_batch(run_id, metrics=metrics)

    def _send(self, job: Job) -> None:
        """Do a job, again where that may help: a point sent twice is the same point, it has its time stamp."""
        client, run_id = self._client, self._run_id
        if client is not None and run_id is not None:
            self._try(lambda: job(client, run_id), seconds=RETRY_SECONDS)

    def _try(self, action: Callable[[], object], seconds: float) -> None:
        """Do something, again where that may help, for `seconds`; with a journal, while the tracker is open."""
        deadline, pause, failures = time.monotonic() + seconds, PAUSE_SECONDS, 0
        while not self._off and not self._stop.is_set():
            began = time.monotonic()
            try:
                action()
                if self._journal is not None:
                    self._outage.answered()
                return
            except NoRun:  # it has said why
                self._off = True
                return
            except Exception as error:
                failures += 1
                if is_final(error) or (self._journal is None and time.monotonic() + pause > deadline):
                    self._give_up(self._explained(error))
                    return
                if self._journal is not None and failures > 1 and not isinstance(error, NoRunYet):
                    self._outage.failed(began, error)
            self._ready.set()
            if self._hurry.is_set():
                self._stop.wait(PAUSE_SECONDS)
            else:
                self._hurry.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _noted(self, journal: Journal, point: Point) -> bool:
        """Write a point to the journal; whether it is new."""
        try:
            return journal.add(point)
        except OSError as error:
            if str(journal.path) not in _already_said:
                _already_said.add(str(journal.path))
                say(f"{journal.path} cannot be written ({error.strerror or error}): only MLflow has the run's points.")
            return True

    def _explained(self, error: Exception) -> Exception:
        """The error, or what it comes from: an experiment that has been deleted refuses in many ways."""
        if self._client is not None and self._experiment_id is not None and not isinstance(error, ExperimentDeleted):
            try:
                group = self._client.get_experiment(self._experiment_id)
            except Exception:
                return error
            if group.lifecycle_stage == "deleted":
                return ExperimentDeleted(group)
        return error

    def _give_up(self, error: Exception) -> None:
        """Say why, once a process, and do nothing from now on."""
        if self._off:
            return
        self._off = True
        place = f"{self.uri} {error.experiment_id}" if isinstance(error, ExperimentDeleted) else self.uri
        if place in _already_said:
            return
        _already_said.add(place)
        if isinstance(error, ExperimentDeleted):
            restore = f"MLFLOW_TRACKING_URI={shown(self.uri)} mlflow experiments restore -x {error.experiment_id}"
            later = ", then resume the run, which sends all of it" if self._journal is not None else ""
            say(
                f"MLflow's experiment {error.name} at {shown(self.uri)} has been deleted: the run goes on without "
                f"tracking; get it back with `{restore}`{later}."
            )
            return
        say(
            f"MLflow at {shown(self.uri)} cannot be used ({reason(error)}): the run goes on without tracking; check "
            "MLFLOW_TRACKING_URI, or unset it for a local file."
        )


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
