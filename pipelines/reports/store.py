"""What a report reads from MLflow: a sweep's parent run with its `sweep.json`, and its trials; nothing is made."""

import contextlib
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from esper.pipelines.reports.paired_tests import counted
from esper.pipelines.reports.runs import FINAL, NEEDED, Run
from esper.platform.console import say
from esper.platform.deadline import within
from esper.platform.errors import UserError, unknown
from esper.platform.tracking_store import connect, probe, reason, shown, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

READERS = 8  # summaries that are downloaded at once
SECONDS, OPENING_SECONDS = 60.0, 30.0  # that one call to MLflow may take in all, and the first one
T = TypeVar("T")


@dataclass(frozen=True)
class Sweep:
    """A sweep's parent run."""

    store: str
    experiment: str
    run: "MlflowRun"
    record: dict[str, Any]  # its `sweep.json`

    @property
    def name(self) -> str:
        """That of the run, else its id."""
        return self.run.info.run_name or self.run.info.run_id

    @property
    def where(self) -> str:
        """Store, experiment and run id, in words."""
        return f"{self.store}, experiment {self.experiment}, parent run {self.run.info.run_id}"

    @property
    def started(self) -> str:
        """Start time, in UTC."""
        return f"{datetime.fromtimestamp(self.run.info.start_time / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def open_store(uri: str | None) -> "MlflowClient":
    """A client of an existing store; refuses another within seconds, not MLflow's minutes."""
    address = uri or tracking_uri()
    file = sqlite_file(address)
    address = address if file is None else f"sqlite:///{file.resolve()}"
    if not _is_there(address):
        mend = "give --tracking-uri, set MLFLOW_TRACKING_URI, or run this where the sweep was run."
        raise UserError(f"there is no MLflow store at {shown(address)}: {mend}")

    def opened() -> "MlflowClient":
        probe(address)
        client = connect(address)
        client.search_experiments(max_results=1)
        return client

    return asked(address, opened, OPENING_SECONDS)


def asked(store: "MlflowClient | str", call: Callable[[], T], seconds: float = SECONDS) -> T:
    """The call's result; raises UserError where it fails or takes longer than `seconds`."""
    try:
        return within(seconds, call)
    except Exception as error:  # whatever the driver of an address raises
        where = shown(store if isinstance(store, str) else store.tracking_uri)
        why = f"MLflow at {where} cannot be read ({reason(error)})"
        raise UserError(f"{why}: check --tracking-uri, or MLFLOW_TRACKING_URI.") from error


def _is_there(address: str) -> bool:
    """Whether the store exists: MLflow would make a new one."""
    file = sqlite_file(address)
    if file is not None:
        try:
            with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
                return bool(database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone())
        except sqlite3.Error:
            return False
    folder = address.removeprefix("file://").removeprefix("file:")
    return "://" in folder or any(Path(folder).glob("*/meta.yaml"))


def find_sweeps(client: "MlflowClient", experiment: str | None, wanted: str | None) -> Iterator[Sweep]:
    """Sweeps with a `sweep.json`, newest first, of an experiment (None: all) and run id or name (None: any)."""
    known = {found.experiment_id: found.name for found in asked(client, client.search_experiments)}
    if experiment is not None and experiment not in known.values():
        raise unknown("experiment", experiment, known.values())
    ids = [id for id, name in known.items() if experiment in (None, name)]
    parents = _search(client, ids, "tags.kind = 'sweep'")
    named = [run for run in parents if wanted in (None, run.info.run_id, run.info.run_name)]
    if parents and not named:
        raise unknown("sweep", wanted, [run.info.run_name or run.info.run_id for run in parents])
    store, none = shown(client.tracking_uri), True
    for run in named:
        record = asked(client, partial(_artifact, client, run.info.run_id, "sweep.json"))
        if record is not None:
            none = False
            yield Sweep(store, known[run.info.experiment_id], run, record)
    if none:
        raise UserError(f"MLflow at {store} holds no such sweep with a sweep.json: run `esper sweep` first.")


def read_runs(client: "MlflowClient", sweeps: Iterable[Sweep]) -> tuple[list[Run], list[str]]:
    """The trials of sweeps, of which one must have finished, and notes on those left out."""
    calls = []
    for sweep in sweeps:
        where = f"tags.kind = 'trial' AND tags.`mlflow.parentRunId` = '{sweep.run.info.run_id}'"
        for run in _search(client, [sweep.run.info.experiment_id], where):
            calls.append(partial(asked, client, partial(_read_run, client, sweep.run.info.run_id, run)))
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda call: call(), calls))
    runs = [run for run in read if run is not None]
    if not any(run.status == "FINISHED" for run in runs):
        raise UserError("no trial has finished: wait for one, or go on with the sweep (`esper sweep --resume`).")
    lost = len(read) - len(runs)
    notes = [f"{counted(lost, 'run')} left out: without a trial's tags, or a whole summary.json."] if lost else []
    for note in notes:
        say(f"note    {note}")
    return runs, notes


def _read_run(client: "MlflowClient", sweep: str, run: "MlflowRun") -> Run | None:
    tags, info = run.data.tags, run.info
    try:
        size, seed = int(tags["size"]) if tags.get("size") else None, int(tags["seed"])
        words = (tags["label"], tags["arm"], size, seed, tags["purpose"], tags["grid"])
    except (KeyError, ValueError):
        return None
    summary: Any = {key: run.data.metrics.get(key) for key in FINAL}  # the latest of each
    if info.status == "FINISHED":
        summary = _artifact(client, info.run_id, "summary.json")
        if summary is None or not summary.keys() >= NEEDED:
            return None
    return Run(info.run_id, sweep, info.run_name or info.run_id, *words, status=info.status, summary=summary)


def _search(client: "MlflowClient", experiments: list[str], where: str) -> list["MlflowRun"]:
    order, runs, token = ["attributes.start_time DESC"], [], None
    while token != "":
        search = partial(client.search_runs, experiments, where, max_results=1000, order_by=order, page_token=token)
        page = asked(client, search)
        runs += page
        token = page.token or ""
    return runs


def _artifact(client: "MlflowClient", run_id: str, name: str) -> dict[str, Any] | None:
    if not any(file.path == name for file in client.list_artifacts(run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8"))
