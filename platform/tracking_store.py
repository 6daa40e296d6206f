"""An MLflow store: where it is, whether it answers, and what is found and made there.

The store is `MLFLOW_TRACKING_URI`, or else `mlflow.db` in the working directory with its artifacts in `mlruns/` beside
it. Where the working directory does not last (`ray job submit --working-dir`), set `MLFLOW_TRACKING_URI`. MLflow itself
is imported when it is first needed: that takes seconds.
"""

import json
import os
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from esper.platform.console import say
from esper.platform.deadline import within
from esper.platform.errors import UserError
from esper.platform.journal import Entry
from esper.platform.storage import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

# Read by MLflow when it is imported; what the user has set stays.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its retries take minutes and warn each time: callers have their own
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # no tables that are made, no tracebacks: what goes wrong is said here
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
PROBE_SECONDS = 5  # a server that does not answer its health page by then is not there
KEY = "esper.key"  # a tag: what tells a run from all others
METRICS_A_BATCH, PARAMS_A_BATCH, DIGEST_LENGTH = 1000, 100, 36  # MLflow's own limits


@dataclass(frozen=True)
class Place:
    """Where a run is kept; `fresh` where the store had no such run."""

    client: "MlflowClient"
    run_id: str
    experiment_id: str
    fresh: bool


class NoParentYet(Exception):
    """The store does not have the run that another is a child of."""


class ExperimentDeleted(Exception):
    """The experiment has been deleted."""

    def __init__(self, experiment_id: str, name: str) -> None:
        super().__init__(experiment_id)
        self.experiment_id, self.name = experiment_id, name


def tracking_uri() -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI`, else an SQLite file in the working directory; files absolute.

    Raises:
        UserError: the file's path has letters that no address of MLflow can hold.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = sqlite_file(uri)
    if file is None:
        return uri
    if re.search("[%?]", str(file.resolve())):
        raise UserError(
            f"MLflow's file cannot be {file.resolve()}, for MLflow takes % and ? for something else: work in a folder "
            "without them, or set MLFLOW_TRACKING_URI."
        )
    return f"sqlite:///{file.resolve()}"


def sqlite_file(uri: str) -> Path | None:
    """The file of an `sqlite:///` store."""
    path = uri.removeprefix("sqlite:///").split("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def is_server(uri: str) -> bool:
    """Whether a store is a tracking server."""
    return uri.startswith(("http://", "https://"))


def ui_command(uri: str) -> str:
    """What shows a store that has no server."""
    return f"mlflow ui --backend-store-uri {shown(uri)} --host 127.0.0.1"


def shown(uri: str) -> str:
    """A store's address without the password that may be in it."""
    return re.sub(r"//[^/@]*@", "//", uri)


def probe(uri: str) -> None:
    """Find out quickly whether a server answers; any answer will do, MLflow judges the rest."""
    if is_server(uri):
        health = shown(uri).rstrip("/") + "/health"
        try:
            urllib.request.urlopen(health, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as answer:
            answer.close()
        except urllib.error.URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else error from None


def connect(uri: str) -> "MlflowClient":
    """A client whose store exists: the first to come makes an SQLite file's tables, the others wait for it.

    They are made beside the file's place and renamed: MLflow cannot use a store that was killed while it made them.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    file = sqlite_file(uri)
    if file is not None:  # no connection outlives a request: the file may have been deleted, and made anew
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    from mlflow import MlflowClient

    if file is None:  # other stores look after themselves
        return MlflowClient(uri)
    with locked(file.with_name(f"{file.name}.lock")):
        if not file.exists() or file.stat().st_size == 0:
            partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
            MlflowClient(f"sqlite:///{partial}")
            partial.replace(file)
        return MlflowClient(uri)


def find_run(uri: str, header: Entry) -> Place:
    """The run of a journal's first entry, which is made where the store has none of its key.

    Raises:
        ExperimentDeleted: the experiment has been deleted.
        NoParentYet: the run that it is a child of is not there.
    """
    within(PROBE_SECONDS, partial(probe, uri))
    client = connect(uri)
    experiment = _experiment(client, header["experiment"], uri)
    if experiment.lifecycle_stage == "deleted":
        raise ExperimentDeleted(experiment.experiment_id, experiment.name)
    run = _run_with_key(client, experiment.experiment_id, header["key"])
    if run is not None:
        return Place(client, run.info.run_id, experiment.experiment_id, fresh=False)
    tags = {KEY: header["key"]}
    if header["parent"] is not None:
        group = client.get_experiment_by_name(header["parent"]["experiment"])
        parent = group and _run_with_key(client, group.experiment_id, header["parent"]["key"])
        if parent is None:
            raise NoParentYet("its parent is not there yet")
        tags["mlflow.parentRunId"] = parent.info.run_id
    made = client.create_run(experiment.experiment_id, start_time=header["at"], tags=tags, run_name=header["name"])
    return Place(client, made.info.run_id, experiment.experiment_id, fresh=True)


def send(place: Place, entries: Sequence[Entry], folder: Path) -> int:
    """Send the first of some entries, or as many points as go into one request; how many that were."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    client, run_id, entry = place.client, place.run_id, entries[0]
    match entry["kind"]:
        case "point":
            metrics: list[Metric] = []
            count = 0
            for point in entries:
                if point["kind"] != "point" or (count and len(metrics) + len(point["metrics"]) > METRICS_A_BATCH):
                    break
                metrics += [Metric(key, value, point["at"], point["step"]) for key, value in point["metrics"].items()]
                count += 1
            client.log_batch(run_id, metrics=metrics)
            return count
        case "run":
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in entry["tags"].items()])
            there = client.get_run(run_id).data.params
            params = [Param(key, value) for key, value in entry["params"].items() if key not in there]
            for first in range(0, len(params), PARAMS_A_BATCH):
                client.log_batch(run_id, params=params[first : first + PARAMS_A_BATCH])
        case "tag":
            client.set_tag(run_id, entry["key"], entry["value"])
        case "artifact":
            _send_artifact(place, folder / entry["path"], entry["folder"])
        case "input":
            source, profile = json.dumps({"uri": entry["source"]}), json.dumps(entry["profile"])
            data = Dataset(entry["name"], entry["digest"][:DIGEST_LENGTH], "local", source, profile=profile)
            client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
        case "end":
            client.set_terminated(run_id, entry["status"], entry["at"])
    return 1


def _experiment(client: "MlflowClient", name: str, uri: str) -> "Experiment":
    """The experiment, which another process may be making at the same time."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found
    file, folder = sqlite_file(uri), re.sub(r"[^\w\-.]", "_", name)
    try:
        made = client.create_experiment(name, (file.parent / "mlruns" / folder).as_uri() if file else None)
        return client.get_experiment(made)
    except MlflowException:
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return found


def _run_with_key(client: "MlflowClient", experiment: str, key: str) -> "Run | None":
    """The run with a key: the older one, should two processes have made it at once."""
    runs = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1, order_by=["start_time ASC"])
    return runs[0] if runs else None


def _send_artifact(place: Place, source: Path, folder: str | None) -> None:
    try:
        if source.is_dir():
            place.client.log_artifacts(place.run_id, str(source), folder)
        else:
            place.client.log_artifact(place.run_id, str(source.resolve(strict=True)), folder)
    except FileNotFoundError:
        say(f"MLflow artifact {source} is not there any more and was left out.")
    except PermissionError as error:
        say(f"MLflow artifact {source} cannot be kept ({error.filename}: {error.strerror}) and was left out.")


def is_final(error: Exception) -> bool:
    """Whether to ask again would be refused again: the request or the address was wrong, or the run is gone."""
    if isinstance(error, (ExperimentDeleted, ImportError, TypeError, AttributeError, KeyError)):
        return True
    if isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)):  # a folder of a local store
        return True
    if re.search("IntegrityError|UniqueViolation", str(error)):  # another process has just made the same data set
        return False
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (408, 429)


def reason(error: Exception) -> str:
    """What went wrong, short and without a password: the bottom of requests' long tale, or else the first line."""
    text = str(error).strip() or type(error).__name__
    bottom = re.search(r"\[Errno -?\d+\] ([\w ]+)|(?i:read )?timed out", text) if "HTTPConnectionPool" in text else None
    line = (bottom[1] or "timed out") if bottom else re.sub(r"^\[Errno -?\d+\] ", "", text.splitlines()[0])
    return shown(line)[:200].rstrip(".: ")
