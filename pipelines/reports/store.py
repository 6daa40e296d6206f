"""What a report reads from MLflow: a sweep's parent run with its `sweep.json`, and of each child its tags and summary.

Nothing is made or changed: a store that is not there is told of. Runs that no sweep logged are skipped and counted.
"""

import contextlib
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from esper.pipelines.reports.paired_tests import counted
from esper.pipelines.reports.runs import FINAL, NEEDED, Run
from esper.platform import tracking_store
from esper.platform.console import say
from esper.platform.deadline import within
from esper.platform.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

TAGS = ("label", "arm", "seed", "purpose", "grid")  # without one of them a run is no trial of a sweep
READERS = 8  # summaries that are downloaded at once
DEADLINE = 60.0  # seconds that one call to MLflow may take in all
SHOWN = 5  # names that an error lists at most
ELSEWHERE = "give --tracking-uri, set MLFLOW_TRACKING_URI, or run this where the sweep was run."

T = TypeVar("T")


@dataclass(frozen=True)
class Sweep:
    """A sweep's parent run; `record` is its `sweep.json`."""

    store: str
    experiment: str
    experiment_id: str
    run_id: str
    name: str
    record: dict[str, Any]
    tags: dict[str, str] = field(default_factory=dict)
    started: str = ""
    status: str = ""

    @property
    def where(self) -> str:
        """In words."""
        return f"{self.store}, experiment {self.experiment}, parent run {self.run_id}"


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

    def opened() -> "MlflowClient":
        tracking_store.probe(address)
        if address.startswith(("postgresql", "mysql", "mssql")):  # MLflow itself would try for minutes
            from sqlalchemy import create_engine

            engine = create_engine(address, connect_args={"connect_timeout": tracking_store.PROBE_SECONDS})
            engine.connect().close()
            engine.dispose()
        client = tracking_store.connect(address)
        client.search_experiments(max_results=1)
        return client

    store = tracking_store.shown(address)
    return asked(store, opened, Exception), store  # a wrong address raises whatever its driver does


def asked(store: str, call: Callable[[], T], *errors: type[Exception]) -> T:
    """What a call to MLflow returns.

    Raises:
        UserError: MLflow or the network failed (or with one of `errors`), or it took longer than DEADLINE.
    """
    try:
        return within(DEADLINE, call)
    except UserError:
        raise
    except Exception as error:
        from mlflow.exceptions import MlflowException

        if not isinstance(error, (MlflowException, OSError, *errors)):
            raise
        why = f"MLflow at {store} cannot be read ({tracking_store.reason(error)})"
        raise UserError(f"{why}: check --tracking-uri, or MLFLOW_TRACKING_URI.") from error


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


# -- Sweeps ------------------------------------------------------------------------------------------------------------


def newest_experiment(client: "MlflowClient", store: str) -> str:
    """The experiment of a store's newest sweep.

    Raises:
        UserError: there is no sweep.
    """
    known = {found.experiment_id: found.name for found in asked(store, client.search_experiments)}
    newest = partial(client.search_runs, list(known), "tags.kind = 'sweep'", max_results=1)
    for run in asked(store, partial(newest, order_by=["attributes.start_time DESC"])):
        return known[run.info.experiment_id]
    raise UserError(f"MLflow at {store} holds no sweep: run `esper sweep` first, or name another store.")


def find_sweeps(client: "MlflowClient", store: str, name: str, wanted: str | None) -> Iterator[Sweep]:
    """An experiment's sweeps of a run id or name, else all, that have a `sweep.json`; the newest first.

    Raises:
        UserError: the experiment or the sweep is not there, or none has one.
    """
    experiment = asked(store, lambda: client.get_experiment_by_name(name))
    if experiment is None:
        near = _near(name, [known.name for known in asked(store, client.search_experiments)])
        raise UserError(f"MLflow at {store} has no experiment {name!r}: the nearest are {near}.")
    id = experiment.experiment_id
    if experiment.lifecycle_stage == "deleted":
        restore = f"MLFLOW_TRACKING_URI={store} mlflow experiments restore --experiment-id {id}"
        raise UserError(f"experiment {name!r} was deleted: restore it with `{restore}`.")
    parents = asked(store, lambda: _search(client, id, "tags.kind = 'sweep'"))
    if not parents:
        raise UserError(f"experiment {name!r} holds no sweep: run `esper sweep` first, or name another one.")
    named = [run for run in parents if wanted in (None, run.info.run_id, run.info.run_name)]
    if not named:
        near = _near(str(wanted), [run.info.run_name or run.info.run_id for run in parents])
        raise UserError(f"experiment {name!r} has no sweep {wanted!r}: there are {near}.")
    none = True
    for info, tags in ((run.info, run.data.tags) for run in named):
        record = asked(store, partial(_artifact, client, info.run_id, "sweep.json"))
        if isinstance(record, dict):
            none, run_name = False, info.run_name or info.run_id
            started = f"{datetime.fromtimestamp(info.start_time / 1000, UTC):%Y-%m-%d %H:%M} UTC"
            yield Sweep(store, name, id, info.run_id, run_name, record, tags, started, info.status)
    if none:
        raise UserError(
            f"no sweep {wanted or f'in {name!r}'} has a sweep.json, which a report is made of: run it again."
        )


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


def read_runs(client: "MlflowClient", sweeps: Iterable[Sweep]) -> tuple[list[Run], list[str]]:
    """The trials of sweeps, and how many of their runs were left out and why, in sentences, which are said too.

    Raises:
        UserError: no trial has finished.
    """
    skipped: Counter[str] = Counter()
    calls = []
    for sweep in sweeps:
        where = f"tags.`mlflow.parentRunId` = '{sweep.run_id}'"
        for run in asked(sweep.store, partial(_search, client, sweep.experiment_id, where)):
            if reason := _no_trial(run):
                skipped[reason] += 1
            else:
                calls.append(partial(asked, sweep.store, partial(_read_run, client, sweep.run_id, run)))
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda call: call(), calls))
    skipped.update(reason for reason in read if isinstance(reason, str))
    runs = [run for run in read if isinstance(run, Run)]
    if not any(run.status == "FINISHED" for run in runs):
        raise UserError("no trial has finished: wait for one, or go on with the sweep (`esper sweep --resume`).")
    notes = [f"{counted(n, 'run')} left out: {why}." for why, n in skipped.items()]
    for note in notes:
        say(f"note    {note}")
    return runs, notes


def _no_trial(run: "MlflowRun") -> str:
    """Why a run is none of a sweep's trials; empty where it is one."""
    tags = run.data.tags
    if tags.get("kind") != "trial" or any(tag not in tags for tag in TAGS):
        return "no trials of a sweep (older ones, or other programs')"
    try:
        json.loads(f"[{tags['seed']}, {tags.get('size') or 0}, {tags['grid']}]")
    except ValueError:
        return "trials with tags that cannot be read"
    return ""


def _read_run(client: "MlflowClient", sweep: str, run: "MlflowRun") -> Run | str:
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
    return Run(info.run_id, sweep, info.run_name or info.run_id, *words, status=info.status, summary=summary)
