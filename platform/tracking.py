"""MLflow tracking that never holds up or stops a run.

A `Tracker` is one MLflow run. Its thread imports MLflow (seconds), connects, and sends what is put into its queue, in
order; the training thread only ever appends to that queue. A server that cannot be reached costs one sentence, and the
tracker does nothing from then on.

The store is `MLFLOW_TRACKING_URI`, or else `mlflow.db` in the working directory with its artifacts in `mlruns/` beside
it. Where the working directory does not last (`ray job submit --working-dir`), set `MLFLOW_TRACKING_URI`.
"""

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from esper.platform.console import say
from esper.platform.storage import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
Job = Callable[["MlflowClient", str], object]  # does its one thing with the client and the run's id

# Read by MLflow when it is imported; what the user has set stays.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its retries take minutes and warn each time: the thread has its own
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no "Creating initial MLflow database tables..."
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
PROBE_SECONDS = 5  # a server that does not answer its health page by then is not there
READY_SECONDS = 60  # the longest that anyone waits for the connection: MLflow's import and a first migration
RETRY_SECONDS = 60  # a server that restarts in mid-run has this long
CLOSE_SECONDS = 30
VALUE_LENGTH, TAG_LENGTH, KEY_LENGTH, PARAMS_A_BATCH = 6000, 8000, 250, 100  # MLflow's own limits

KEY = "esper.key"  # a tag

_already_said: set[str] = set()  # stores whose absence was reported: once a process, not once a trial


class Tracker:
    """One MLflow run, written to from any thread without waiting. Use `Tracker.start`, best in a `with` block."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._ready = threading.Event()  # connected, or never going to be
        self._off = False
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._run_id: str | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        *,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        parent: str | None = None,
        key: str | None = None,
    ) -> "Tracker":
        """Begin a run; returns at once, while the connection is made in the background.

        Args:
            experiment: The group of runs it belongs to, made where it does not exist.
            run_name: How the UI calls it.
            tags: What the UI filters by (arm, seed, preset, git commit).
            params: The configuration; nested mappings become dotted keys (`host.n_layer`).
            parent: `run_id` of the run this one is a child of.
            key: what tells this run from all others (`new_key`). Where the store has a run with it already, that one is
                gone on with: a run that is resumed, even after a death before MLflow had answered, stays one run.
        """
        tracker = cls(tracking_uri())
        began = milliseconds()
        labels = {key: str(value)[:TAG_LENGTH] for key, value in (tags or {}).items()}
        if parent:
            labels["mlflow.parentRunId"] = parent
        flat = flatten(params or {})

        def work() -> None:
            try:
                tracker._connect(experiment, run_name, labels, flat, began, key)
            except Exception as error:
                tracker._give_up(error)
            finally:
                tracker._ready.set()
            while job := tracker._jobs.get():
                tracker._send(job)

        tracker._thread = threading.Thread(target=work, name=f"tracking {run_name}", daemon=True)
        tracker._thread.start()
        return tracker

    def log(self, metrics: Mapping[str, float], step: int, at: int | None = None) -> None:
        """Record `metrics` at `step`: one request, one time stamp for all keys.

        Args:
            metrics: values by key.
            step: that they belong to.
            at: time stamp in milliseconds, this call's if none is given. A point that is sent again with its own is the
                same point, so a resumed training may send all it knows.
        """
        now = milliseconds() if at is None else at
        values = {key: float(value) for key, value in metrics.items()}

        def job(client: "MlflowClient", run_id: str) -> None:
            from mlflow.entities import Metric

            client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

        self._put(job)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Keep a file, or a folder's files, with the run, under `folder` there; it must stay in place until `close`."""
        source = Path(path)

        def job(client: "MlflowClient", run_id: str) -> None:
            if source.is_dir():
                client.log_artifacts(run_id, str(source), folder)
            elif source.exists():
                client.log_artifact(run_id, str(source), folder)
            else:
                say(f"MLflow artifact {source} is not there any more and was left out.")

        self._put(job)

    def tag(self, key: str, value: object) -> None:
        """Set a tag that is known only now, such as the outcome."""
        self._put(lambda client, run_id: client.set_tag(run_id, key, str(value)[:TAG_LENGTH]))

    def close(self, status: Status = "FINISHED", seconds: float = CLOSE_SECONDS) -> None:
        """End the run once everything has been sent, waiting for that for at most `seconds`. A second call is idle.

        A connection that is still being made (a short run, a busy machine) has its own `READY_SECONDS` first.
        """
        if self._thread is None:
            return
        ended = milliseconds()
        self._put(lambda client, run_id: client.set_terminated(run_id, status, ended))
        self._jobs.put(None)
        self._ready.wait(READY_SECONDS)
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._off:
            self._off = True
            say(f"MLflow at {_shown(self._uri)} did not take the run's last records within {seconds:g} s: left out.")
        self._thread = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, waiting for the connection where needed; None where there is none."""
        self._ready.wait(READY_SECONDS)
        return self._run_id

    @property
    def where(self) -> str:
        """How to look at the run: the command that opens the UI, or the page on the server."""
        run_id = self.run_id
        if run_id is None:
            return "not tracked"
        if self._uri.startswith(("http://", "https://")):
            return f"{_shown(self._uri).rstrip('/')}/#/experiments/{self._experiment_id}/runs/{run_id}"
        return f"mlflow ui --backend-store-uri {_shown(self._uri)} --host 127.0.0.1"

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _put(self, job: Job) -> None:
        """Queue a job, unless nobody will do it."""
        if not self._off and self._thread is not None:
            self._jobs.put(job)

    def _connect(
        self,
        experiment: str,
        name: str,
        tags: dict[str, str],
        params: dict[str, str],
        began: int,
        key: str | None,
    ) -> None:
        """Import MLflow, find the store, make experiment and run."""
        _probe(self._uri)
        client = _client(self._uri)
        self._experiment_id = _experiment(client, experiment, self._uri)
        if key is not None:
            before = _found(client, self._experiment_id, key)
            if before is not None:
                client.update_run(before, status="RUNNING")
                self._client, self._run_id = client, before
                return
            tags = tags | {KEY: key}
        run = client.create_run(self._experiment_id, start_time=began, tags=tags, run_name=name)
        from mlflow.entities import Param

        pairs = [Param(key, value) for key, value in params.items()]
        for first in range(0, len(pairs), PARAMS_A_BATCH):
            client.log_batch(run.info.run_id, params=pairs[first : first + PARAMS_A_BATCH])
        self._client, self._run_id = client, run.info.run_id

    def _send(self, job: Job) -> None:
        """Do a job, again where that may help: a point sent twice is the same point, it has its time stamp."""
        deadline, pause = time.monotonic() + RETRY_SECONDS, 0.5
        while not self._off and self._client is not None and self._run_id is not None:
            try:
                job(self._client, self._run_id)
                return
            except Exception as error:
                if _is_final(error) or time.monotonic() + pause > deadline:
                    self._give_up(error)
                    return
                time.sleep(pause)
                pause = min(2 * pause, 10)

    def _give_up(self, error: Exception) -> None:
        """Say why, once a process, and do nothing from now on."""
        if self._off:
            return
        self._off = True
        if self._uri not in _already_said:
            _already_said.add(self._uri)
            reason = _shown((str(error).strip() or type(error).__name__).splitlines()[0])[:200].rstrip(".: ")
            say(
                f"MLflow at {_shown(self._uri)} cannot be used ({reason}): the run goes on without tracking; check "
                "MLFLOW_TRACKING_URI, or unset it for a local file."
            )


def new_key() -> str:
    """A key that no other run has."""
    return uuid.uuid4().hex


def tracking_uri() -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI`, else an SQLite file in the working directory; files absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = _sqlite_file(uri)
    return f"sqlite:///{file.resolve()}" if file else uri


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


def _probe(uri: str) -> None:
    """Find out quickly whether a server answers; any answer will do, MLflow judges the rest."""
    if uri.startswith(("http://", "https://")):
        health = re.sub(r"//[^/@]*@", "//", uri).rstrip("/") + "/health"
        try:
            urllib.request.urlopen(health, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as answer:
            answer.close()
        except urllib.error.URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else error from None


def _client(uri: str) -> "MlflowClient":
    """A client whose store exists: the first to come makes an SQLite file's tables, the others wait for it.

    They are made beside the file's place and renamed: MLflow cannot use a store that was killed while it made them.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    file = _sqlite_file(uri)
    if file is None:  # other stores look after themselves
        return MlflowClient(uri)
    with locked(file.with_name(f"{file.name}.lock")):
        if not file.exists():
            partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
            MlflowClient(f"sqlite:///{partial}")
            partial.rename(file)
        return MlflowClient(uri)


def _experiment(client: "MlflowClient", name: str, uri: str) -> str:
    """The id of the experiment, which another process may be making at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        folder = re.sub(r"[^\w\-.]", "_", name)
        try:
            return client.create_experiment(name, (file.parent / "mlruns" / folder).as_uri() if file else None)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _found(client: "MlflowClient", experiment: str, key: str) -> str | None:
    """The run with a key."""
    runs = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    return runs[0].info.run_id if runs else None


def _sqlite_file(uri: str) -> Path | None:
    """The file of an `sqlite:///` store."""
    path = uri.removeprefix("sqlite:///").split("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def _is_final(error: Exception) -> bool:
    """Whether to ask again would be refused again: the request was wrong, or the run is gone."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status != 429


def _shown(uri: str) -> str:
    """A store's address without the password that may be in it."""
    return re.sub(r"//[^/@]*@", "//", uri)


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return int(time.time() * 1000)
