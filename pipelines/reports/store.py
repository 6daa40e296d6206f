"""What a report reads from MLflow: a sweep's parent run with its `sweep.json`, and of each child its tags and summary.

Nothing is made or changed: a store that is not there is told of. Runs that no sweep logged are skipped and counted.
"""

import contextlib
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.pipelines.reports.runs import FINAL, NEEDED, Run
from esper.platform import tracking_store
from esper.platform.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

TAGS = ("label", "arm", "seed", "purpose", "grid")  # without one of them a run is no trial of a sweep
READERS = 8  # summaries that are downloaded at once
SHOWN = 5  # names that an error lists at most
ELSEWHERE = "give --tracking-uri, set MLFLOW_TRACKING_URI, or run this where the sweep was run."


@dataclass(frozen=True)
class Sweep:
    """A sweep's parent run: `record` is its `sweep.json`, `started` in milliseconds."""

    run_id: str
    name: str
    record: dict[str, Any]
    tags: dict[str, str] = field(default_factory=dict)
    started: int = 0
    status: str = ""


def open_store(uri: str | None) -> tuple["MlflowClient", str]:
    """A client of a store that is there, and the store's address without a password.

    Args:
        uri: None for `MLFLOW_TRACKING_URI`, else `mlflow.db` in the working directory.

    Raises:
        UserError: the address is wrong, nothing is there, or it refuses. Within seconds, not MLflow's minutes.
    """
    address = uri or tracking_store.tracking_uri()
    file = tracking_store.sqlite_file(address)
    if file is not None:
        address = f"sqlite:///{file.resolve()}"
        _check_database(file.resolve())
    elif "://" not in address or address.startswith("file:"):
        folder = Path(address.removeprefix("file://").removeprefix("file:"))
        if not any(folder.glob("*/meta.yaml")):
            raise UserError(f"there are no MLflow experiments in {folder}: {ELSEWHERE}")
    shown = tracking_store.shown(address)
    for name, value in tracking_store.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with asked(shown, (Exception,)):  # a wrong address raises whatever its driver does
        tracking_store.probe(address)
        if address.startswith(("postgresql", "mysql", "mssql")):
            _connect_once(address)
        from mlflow import MlflowClient

        client = MlflowClient(address)
        client.search_experiments(max_results=1)
    return client, shown


@contextlib.contextmanager
def asked(shown: str, errors: tuple[type[Exception], ...] | None = None) -> Iterator[None]:
    """What goes wrong in talking to MLflow, as one sentence; by default MLflow's own errors and the network's."""
    if errors is None:
        from mlflow.exceptions import MlflowException

        errors = (MlflowException, OSError)
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(
            f"MLflow at {shown} cannot be read ({tracking_store.reason(error)}): check --tracking-uri, or "
            "MLFLOW_TRACKING_URI."
        ) from error


def _check_database(file: Path) -> None:
    """Refuse an SQLite file that MLflow would make, or would fill with its tables."""
    if not file.is_file():
        raise UserError(f"there is no MLflow database {file}: {ELSEWHERE}")
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
    except sqlite3.Error:
        found = None
    if not found:
        raise UserError(f"{file} is not a database of MLflow's: {ELSEWHERE}")


def _connect_once(uri: str) -> None:
    """Find out whether a database server lets us in; MLflow itself would try for minutes."""
    from sqlalchemy import create_engine

    engine = create_engine(uri, connect_args={"connect_timeout": tracking_store.PROBE_SECONDS})
    engine.connect().close()
    engine.dispose()


# -- Experiments and sweeps --------------------------------------------------------------------------------------------


def find_experiment(client: "MlflowClient", name: str, shown: str) -> str:
    """The id of an experiment.

    Raises:
        UserError: there is none of that name, or it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        near = _near(name, [experiment.name for experiment in client.search_experiments()])
        raise UserError(f"MLflow at {shown} has no experiment {name!r}: the nearest are {near}.")
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {name!r} was deleted: restore it with `MLFLOW_TRACKING_URI={shown} mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`."
        )
    return found.experiment_id


def find_sweeps(client: "MlflowClient", experiment_id: str, experiment: str, wanted: str | None) -> Iterator[Sweep]:
    """The sweeps of a run id or name, else all, that have a `sweep.json`; the newest first.

    Raises:
        UserError: there is none, or it has none.
    """
    parents = _search(client, experiment_id, "tags.kind = 'sweep'")
    names = {run.info.run_id: run.info.run_name or run.info.run_id for run in parents}
    if not parents:
        raise UserError(f"experiment {experiment!r} holds no sweep: run `esper sweep` first, or name another one.")
    if wanted is not None:
        parents = [run for run in parents if wanted in (run.info.run_id, run.info.run_name)]
    if not parents:
        near = _near(str(wanted), list(names.values()))
        raise UserError(f"experiment {experiment!r} has no sweep {wanted!r}: there are {near}.")
    found = False
    for run in parents:
        record, info = _artifact(client, run.info.run_id, "sweep.json"), run.info
        if isinstance(record, dict):
            found = True
            yield Sweep(info.run_id, names[info.run_id], record, run.data.tags, info.start_time or 0, info.status)
    if not found:
        which = f"sweep {wanted!r} has" if wanted is not None else f"the sweeps in {experiment!r} have"
        raise UserError(f"{which} no sweep.json, without which there is no report: run `esper sweep` again.")


def _near(name: str, known: list[str]) -> str:
    return ", ".join(get_close_matches(name, known, n=3) or known[:SHOWN]) or "none"


def _search(client: "MlflowClient", experiment_id: str, where: str) -> list["MlflowRun"]:
    """All runs that a filter finds, the newest first."""
    runs, token = [], None
    while True:
        page = client.search_runs(
            [experiment_id], where, max_results=1000, order_by=["attributes.start_time DESC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _artifact(client: "MlflowClient", run_id: str, name: str) -> Any:
    """A JSON artifact of a run; None where it has none, or what it has is no JSON."""
    if not any(file.path == name for file in client.list_artifacts(run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ValueError):
        return json.loads(Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8"))
    return None


# -- Runs --------------------------------------------------------------------------------------------------------------


def read_runs(client: "MlflowClient", experiment_id: str, sweeps: Iterable[str]) -> tuple[list[Run], Counter[str]]:
    """The trials of sweeps (parent run ids), the oldest first, and how many runs were skipped, by reason.

    Of two runs of one trial (its store was away, or it was copied) the one that ended counts, else the newest.
    """
    skipped: Counter[str] = Counter()
    chosen: dict[tuple[str, str], MlflowRun] = {}
    for sweep in sweeps:
        for run in _search(client, experiment_id, f"tags.`mlflow.parentRunId` = '{sweep}'"):
            key = sweep, run.info.run_name or run.info.run_id
            if reason := _no_trial(run):
                skipped[reason] += 1
            elif key not in chosen:
                chosen[key] = run
            else:
                skipped["earlier attempts of a trial"] += 1
                if run.info.status == "FINISHED" != chosen[key].info.status:
                    chosen[key] = run
    oldest_first = sorted(chosen, key=lambda key: chosen[key].info.start_time)
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda key: _read_run(client, *key, chosen[key]), oldest_first))
    skipped.update(reason for reason in read if isinstance(reason, str))
    return [run for run in read if isinstance(run, Run)], skipped


def _no_trial(run: "MlflowRun") -> str:
    """Why a run is none of a sweep's trials; empty where it is one."""
    tags = run.data.tags
    if tags.get("kind") != "trial" or any(tag not in tags for tag in TAGS):
        return "no trials of a sweep (older ones, or other programs')"
    try:
        int(tags["seed"]), int(tags.get("size") or 0), json.loads(tags["grid"])
    except ValueError:
        return "trials with tags that cannot be read"
    return ""


def _read_run(client: "MlflowClient", sweep: str, name: str, run: "MlflowRun") -> Run | str:
    """A trial, or what it lacks though it has ended."""
    tags, info = run.data.tags, run.info
    summary: Any = {key: run.data.metrics.get(key) for key in FINAL}  # the latest of each
    if info.status == "FINISHED":
        summary = _artifact(client, info.run_id, "summary.json")
        if not isinstance(summary, dict):
            return "finished without a summary.json"
        if lacking := [key for key in NEEDED if key not in summary]:
            return f"their summary.json lacks {', '.join(lacking)}"
    size = int(tags["size"]) if tags.get("size") else None
    words = (tags["label"], tags["arm"], size, int(tags["seed"]), tags["purpose"], tags["grid"])
    return Run(info.run_id, sweep, name, *words, status=info.status, summary=summary)
