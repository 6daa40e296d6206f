"""An MLflow store: where it is, whether it answers, and what is found and made there.

The store is `MLFLOW_TRACKING_URI`, or else `mlflow.db` in the working directory with its artifacts in `mlruns/` beside
it. Where the working directory does not last (`ray job submit --working-dir`), set `MLFLOW_TRACKING_URI`. MLflow itself
is imported when it is first needed: that takes seconds.
"""

import os
import re
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from esper.platform.console import say
from esper.platform.storage import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

# Read by MLflow when it is imported; what the user has set stays.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its retries take minutes and warn each time: callers have their own
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no "Creating initial MLflow database tables..."
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
PROBE_SECONDS = 5  # a server that does not answer its health page by then is not there
KEY = "esper.key"  # a tag: what tells a run from all others
MODEL = "model"  # the artifact folder of what is registered


def tracking_uri() -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI`, else an SQLite file in the working directory; files absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = sqlite_file(uri)
    return f"sqlite:///{file.resolve()}" if file else uri


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
        health = re.sub(r"//[^/@]*@", "//", uri).rstrip("/") + "/health"
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
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is None:  # other stores look after themselves
        return MlflowClient(uri)
    with locked(file.with_name(f"{file.name}.lock")):
        if not file.exists():
            partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
            MlflowClient(f"sqlite:///{partial}")
            partial.rename(file)
        return MlflowClient(uri)


def experiment_of(client: "MlflowClient", name: str, uri: str) -> "Experiment":
    """The experiment, which another process may be making at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(uri)
        folder = re.sub(r"[^\w\-.]", "_", name)
        try:
            made = client.create_experiment(name, (file.parent / "mlruns" / folder).as_uri() if file else None)
            return client.get_experiment(made)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found


def run_with_key(client: "MlflowClient", experiment: str, key: str) -> "Run | None":
    """The run with a key: the older one, should two processes have made it at once."""
    runs = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1, order_by=["start_time ASC"])
    return runs[0] if runs else None


def log_artifact(client: "MlflowClient", run_id: str, source: Path, folder: str | None) -> bool:
    """Keep a file, or a folder's files; False, and a sentence, where they cannot be read or kept."""
    try:
        if source.is_dir():
            client.log_artifacts(run_id, str(source), folder)
        else:
            client.log_artifact(run_id, str(source.resolve(strict=True)), folder)
    except FileNotFoundError:
        say(f"MLflow artifact {source} is not there any more and was left out.")
    except PermissionError as error:
        say(f"MLflow artifact {source} cannot be kept ({error.filename}: {error.strerror}) and was left out.")
    else:
        return True
    return False


def register_model(client: "MlflowClient", run_id: str, name: str, tags: dict[str, str]) -> None:
    """Make the run's model folder a version of a registered model, or give its version the tags."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    before = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'", max_results=1)
    if before:
        for key, value in tags.items():
            client.set_model_version_tag(name, before[0].version, key, value)
        return
    source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL}"
    client.create_model_version(name, source, run_id, tags, await_creation_for=0)


def reason(error: Exception) -> str:
    """What went wrong, short and without a password: the bottom of requests' long tale, or else the first line."""
    text = str(error).strip() or type(error).__name__
    bottom = re.search(r"\[Errno -?\d+\] ([\w ]+)|(?i:read )?timed out", text) if "HTTPConnectionPool" in text else None
    line = (bottom[1] or "timed out") if bottom else re.sub(r"^\[Errno -?\d+\] ", "", text.splitlines()[0])
    return shown(line)[:200].rstrip(".: ")
