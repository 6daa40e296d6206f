"""An MLflow store: where it is, its client, and how a journal's entries are sent to it.

The store is `MLFLOW_TRACKING_URI`, or else `mlflow.db` in the working directory with its artifacts in `mlruns/` beside
it. Where the working directory does not last (`ray job submit --working-dir`), set `MLFLOW_TRACKING_URI`. MLflow itself
is imported when it is first needed: that takes seconds.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from esper.platform.console import say
from esper.platform.errors import UserError, reason, shown
from esper.platform.journal import Entry
from esper.platform.storage import beside

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, RunInfo
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

# Read by MLflow when it is imported; what the user has set stays.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its retries take minutes and warn each time: callers have their own
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # no tables that are made, no tracebacks: what goes wrong is said here
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # no connection outlives a request: the file may be made anew
}
KEY = "esper.key"  # a tag: what tells a run from all others
POINTS_A_REQUEST = 50
DIGEST_LENGTH = 36  # MLflow's limit


def tracking_uri(uri: str | None = None) -> str:
    """Where runs are kept: `uri`, `MLFLOW_TRACKING_URI` or an SQLite file here; UserError: MLflow cannot name it."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = sqlite_file(uri)
    if file is None:
        return uri
    if re.search("[%?]", str(file.resolve())):
        what = f"MLflow's file cannot be {file.resolve()}, for MLflow takes % and ? for something else"
        raise UserError(f"{what}: work in a folder without them, or set MLFLOW_TRACKING_URI.")
    return f"sqlite:///{file.resolve()}"


def sqlite_file(uri: str) -> Path | None:
    """The file of an `sqlite:///` store."""
    path = uri.removeprefix("sqlite:///").split("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def runs_page(uri: str, experiment_id: str | None) -> str:
    """How to open the page of an experiment's runs; a store without a server needs one first."""
    path = f"#/experiments/{experiment_id}/runs"
    if uri.startswith(("http://", "https://")):
        return f"{shown(uri).rstrip('/')}/{path}"
    server = f"mlflow ui --backend-store-uri {shown(uri)} --host 127.0.0.1"
    return f"start `{server}`, then open http://127.0.0.1:5000/{path}"


def connect(uri: str) -> "MlflowClient":
    """A client of a store; the first makes an SQLite file elsewhere and renames it: MLflow cannot use one half made."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f"{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists() or file.stat().st_size == 0:
                partial = beside(file)
                MlflowClient(f"sqlite:///{partial}")
                partial.replace(file)
    return MlflowClient(uri)


@dataclass
class StoredRun:
    """A run in a store; `made` when it was looked for, for the store had none of its key."""

    client: "MlflowClient"
    info: "RunInfo"
    made: bool

    @classmethod
    def find(cls, uri: str, header: Entry) -> "StoredRun | None":
        """The run of a journal's first entry; None while its parent is not there."""
        client, name, file = connect(uri), header["experiment"], sqlite_file(uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:  # should another process make it now, the next try finds it
            folder = None if file is None else (file.parent / "mlruns").as_uri()
            experiment = client.get_experiment(client.create_experiment(name, folder))
        if (run := _with_key(client, name, header["key"])) is not None:
            return cls(client, run.info, made=False)
        tags = {KEY: header["key"]}
        if header["parent"] is not None:
            parent = _with_key(client, header["parent"]["experiment"], header["parent"]["key"])
            if parent is None:
                return None
            tags["mlflow.parentRunId"] = parent.info.run_id
        run = client.create_run(experiment.experiment_id, header["at"], tags, header["name"])
        return cls(client, run.info, made=True)

    def send(self, entries: Sequence[Entry], folder: Path) -> int:
        """Send the first of some entries of a run in `folder`, or several points at once; how many that were."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        client, run_id, entry = self.client, self.info.run_id, entries[0]
        match entry["kind"]:
            case "point":
                points = list(takewhile(lambda entry: entry["kind"] == "point", entries[:POINTS_A_REQUEST]))
                metrics = [Metric(k, v, at["at"], at["step"]) for at in points for k, v in at["metrics"].items()]
                client.log_batch(run_id, metrics)
                return len(points)
            case "run":
                client.update_run(run_id, status="RUNNING")
                there = client.get_run(run_id).data.params  # MLflow refuses to change one
                params = [Param(key, value) for key, value in entry["params"].items() if key not in there]
                client.log_batch(run_id, params=params, tags=[RunTag(*tag) for tag in entry["tags"].items()])
            case "tag":
                client.set_tag(run_id, entry["key"], entry["value"])
            case "artifact":
                file = os.path.normpath(folder / entry["path"])
                try:
                    client.log_artifact(run_id, file)
                except (FileNotFoundError, PermissionError) as error:  # of the file, or of a store's folder here
                    say(f"MLflow artifact {file} was left out ({error.filename}: {reason(error)}).")
            case "input":
                source, profile = json.dumps({"uri": entry["source"]}), json.dumps(entry["profile"])
                data = Dataset(entry["name"], entry["digest"][:DIGEST_LENGTH], "local", source, profile=profile)
                client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
            case "end":
                client.set_terminated(run_id, entry["status"], entry["at"])
        return 1

    def watch_machine(self) -> "SystemMetricsMonitor":
        """Let MLflow record this machine under `system/`, until the monitor's `finish`, or the server's outage."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        monitor = SystemMetricsMonitor(self.info.run_id, resume_logging=True, tracking_uri=self.client.tracking_uri)
        monitor.start()
        return monitor


def _with_key(client: "MlflowClient", experiment: str, key: str) -> "Run | None":
    """The run with a key: the older one, should two processes have made it at once."""
    found = client.get_experiment_by_name(experiment)
    where, order = f"tags.`{KEY}` = '{key}'", ["start_time ASC"]
    runs = client.search_runs([found.experiment_id], where, max_results=1, order_by=order) if found else []
    return runs[0] if runs else None
