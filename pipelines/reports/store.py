"""What a report reads from MLflow: the sweeps of an experiment, and their trials as data frames. Writes nothing there.

A store that is not there is told of, never made. Runs that a sweep did not log (older ones, other programs') are
skipped and counted.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from esper.pipelines.reports.tables import Tables
from esper.platform import tracking_store
from esper.platform.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

COSTS = ("tokens", "flops", "seconds", "parameter_seconds")
POINT = ("budget_fraction", "steps", *COSTS, "parameters", "val_loss")  # metrics of a decision that a curve holds
FORK = ("val_loss", "budget_fraction", *COSTS)  # metrics of a cooldown fork, after `annealed/`
TAGS = ("label", "arm", "seed", "purpose", "grid")  # without one of them a run is no trial of a sweep
FINALS = ("steps", *COSTS, "wall_seconds", "parameters", "val_loss")
EVENTS = {"grafts": "graft", "prunes": "prune", "rollbacks": "rollback"}
EVENT = ("budget_fraction", "optimizer_step", "site", "blueprint", "outcome")
CHANGE = ("parameters_before", "parameters_after", "val_loss_before", "val_loss_after")

IDENTITY = ["run_id", "label", "arm", "size", "seed", "purpose", "grid"]
COLUMNS = {
    "curves": [*IDENTITY, "kind", "budget_fraction", "steps", *COSTS, "parameters", "val_loss"],
    "finals": [
        *("sweep", "run_id", "name", "arm", "label", "size", "seed", "purpose", "grid", "status", "diverged"),
        *("val_loss", "parameter_seconds", "flops", "seconds", "tokens", "steps", "wall_seconds"),
        *("parameters", "layers", "grafts", "prunes", "rollbacks"),
    ],
    "timeline": ["run_id", "label", "seed", "purpose", "grid", "event", *EVENT, *CHANGE],
}
COUNTS = ("size", "steps", "parameters", "layers", "grafts", "prunes", "rollbacks", "optimizer_step")
COUNTS_CHANGED = ("parameters_before", "parameters_after")

READERS = 8  # runs that a server is asked for at once; a file answers no sooner for it
SHOWN = 5  # names that an error lists at most
Skipped = Counter[str]  # reason → runs


@dataclass
class Sweep:
    """A sweep as MLflow holds it.

    Attributes:
        run_id: of the parent run.
        name: of the parent run.
        record: `sweep.json`; None where the run has none.
        tags: of the parent run.
        started: milliseconds.
        status: of the parent run.
    """

    run_id: str
    name: str
    record: dict[str, Any] | None
    tags: dict[str, str] = field(default_factory=dict)
    started: int = 0
    status: str = ""

    @classmethod
    def read(cls, client: "MlflowClient", run: "Run") -> "Sweep":
        """From its parent run."""
        info = run.info
        record = artifact(client, info.run_id, "sweep.json")
        return cls(info.run_id, info.run_name or info.run_id, record, run.data.tags, info.start_time or 0, info.status)


# -- The store ---------------------------------------------------------------------------------------------------------


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
        _check_folder(Path(address.removeprefix("file://").removeprefix("file:")))
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
        reason = tracking_store.shown((str(error).strip() or type(error).__name__).splitlines()[0])[:200].rstrip(".: ")
        raise UserError(
            f"MLflow at {shown} cannot be read ({reason}): check --tracking-uri, or MLFLOW_TRACKING_URI."
        ) from error


def _check_database(file: Path) -> None:
    """Refuse an SQLite file that MLflow would make, or would fill with its tables."""
    advice = "give --tracking-uri, set MLFLOW_TRACKING_URI, or run this where the sweep was run."
    if not file.is_file():
        raise UserError(f"there is no MLflow database {file}: {advice}")
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
    except sqlite3.Error:
        found = None
    if not found:
        raise UserError(f"{file} is not a database of MLflow's: {advice}")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that MLflow would make, or would make its own."""
    if not folder.is_dir():
        raise UserError(f"there is no MLflow folder {folder}: give --tracking-uri, such as sqlite:///mlflow.db.")
    if not any(folder.glob("*/meta.yaml")):
        raise UserError(f"{folder} holds no MLflow experiments: give --tracking-uri, such as sqlite:///mlflow.db.")


def _connect_once(uri: str) -> None:
    """Find out whether a database server lets us in; MLflow itself would try for minutes."""
    from sqlalchemy import create_engine

    engine = create_engine(uri, connect_args={"connect_timeout": tracking_store.PROBE_SECONDS})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def artifact(client: "MlflowClient", run_id: str, name: str) -> Any:
    """A JSON artifact of a run; None where it has none, or what it has is no JSON."""
    if not any(file.path == name for file in client.list_artifacts(run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ValueError):
        return json.loads(Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8"))
    return None


# -- Experiments and sweeps --------------------------------------------------------------------------------------------


def find_experiment(client: "MlflowClient", name: str, shown: str) -> str:
    """The id of an experiment.

    Raises:
        UserError: there is none of that name, or it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        known = [experiment.name for experiment in client.search_experiments()]
        near = get_close_matches(name, known, n=3) or known[:SHOWN]
        raise UserError(f"MLflow at {shown} has no experiment {name!r}: the nearest are {', '.join(near) or 'none'}.")
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {name!r} was deleted: restore it with `MLFLOW_TRACKING_URI={shown} mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`."
        )
    return found.experiment_id


def search(client: "MlflowClient", experiment_id: str, where: str) -> list["Run"]:
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


def find_sweep(client: "MlflowClient", experiment_id: str, experiment: str, wanted: str | None) -> Sweep:
    """The sweep of a run id or name, else the newest that has a `sweep.json`.

    Raises:
        UserError: there is none, or it has none.
    """
    parents = search(client, experiment_id, "tags.kind = 'sweep'")
    if wanted is not None:
        parents = [run for run in parents if wanted in (run.info.run_id, run.info.run_name)] or _none_of(
            wanted, parents, experiment
        )
    for run in parents:
        sweep = Sweep.read(client, run)
        if sweep.record is not None:
            return sweep
    if not parents:
        raise UserError(f"experiment {experiment!r} holds no sweep: run `esper sweep` first, or name another one.")
    which = f"sweep {wanted!r} has" if wanted is not None else f"the {len(parents)} sweep(s) in {experiment!r} have"
    raise UserError(f"{which} no sweep.json, without which there is no report: run `esper sweep` again.")


def _none_of(wanted: str, parents: list["Run"], experiment: str) -> list["Run"]:
    names = [run.info.run_name or run.info.run_id for run in parents]
    near = get_close_matches(wanted, names, n=3) or names[:SHOWN]
    raise UserError(f"experiment {experiment!r} has no sweep {wanted!r}: there are {', '.join(near) or 'none'}.")


# -- Trials ------------------------------------------------------------------------------------------------------------


def read_tables(client: "MlflowClient", experiment_id: str, sweeps: Iterable[str]) -> tuple[Tables, Skipped]:
    """The trials of sweeps (parent run ids), and how many runs were skipped, by reason.

    A trial that was run again after a fault counts once: as the run that ended, else as the newest.
    """
    skipped: Skipped = Counter()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in COLUMNS}
    for sweep in sweeps:
        chosen: dict[str, Run] = {}
        for run in search(client, experiment_id, f"tags.`mlflow.parentRunId` = '{sweep}'"):
            name = run.info.run_name or run.info.run_id
            if reason := _no_trial(run):
                skipped[reason] += 1
            elif name not in chosen:
                chosen[name] = run
            else:
                skipped["earlier attempts of a trial"] += 1
                if run.info.status == "FINISHED" != chosen[name].info.status:
                    chosen[name] = run
        readers = READERS if tracking_store.is_server(client.tracking_uri) else 1
        with ThreadPoolExecutor(readers) as pool:
            oldest_first = sorted(chosen.values(), key=lambda run: run.info.start_time)
            trials = list(pool.map(partial(_read_trial, client, sweep), oldest_first))
        for trial in trials:
            if trial is None:
                skipped["finished without a summary.json"] += 1
                continue
            for name, own in trial.items():
                rows[name] += own
    return Tables(**{name: _frame(name, own) for name, own in rows.items()}), skipped


def _no_trial(run: "Run") -> str | None:
    """Why a run is none of a sweep's trials; None where it is one."""
    tags = run.data.tags
    if tags.get("kind") != "trial" or any(tag not in tags for tag in TAGS):
        return "no trials of a sweep (older ones, or other programs')"
    try:
        int(tags["seed"])
        int(tags.get("size") or 0)
        json.loads(tags["grid"])
    except ValueError:
        return "trials with tags that cannot be read"
    return None


def _read_trial(client: "MlflowClient", sweep: str, run: "Run") -> dict[str, list[dict[str, Any]]] | None:
    """Rows for each table from one run; None where it has ended but says nothing of itself."""
    tags, info = run.data.tags, run.info
    finished = info.status == "FINISHED"
    summary = artifact(client, info.run_id, "summary.json")
    if finished and not isinstance(summary, dict):
        return None
    summary = summary or {}
    size = tags.get("size")
    identity = {
        "run_id": info.run_id,
        "label": tags["label"],
        "arm": tags["arm"],
        "size": int(size) if size else None,
        "seed": int(tags["seed"]),
        "purpose": tags["purpose"],
        "grid": tags["grid"],
    }
    points = _series(client, run, "", POINT)
    forks = _series(client, run, "annealed/", FORK)
    sizes = {fork.get("steps"): fork.get("parameters") for fork in summary.get("annealed", [])}
    for fork in forks:
        fork["parameters"] = sizes.get(fork["steps"])
    diverged = tags.get("diverged") == "true" or bool(summary.get("diverged"))
    curves = [identity | {"kind": "decision"} | point for point in points]
    curves += [identity | {"kind": "annealed"} | fork for fork in forks if fork.get("val_loss") is not None]
    if finished and not diverged and points:
        curves.append(identity | {"kind": "annealed"} | points[-1])
    reached = summary if finished else run.data.metrics  # the latest of each
    final = {
        **identity,
        "sweep": sweep,
        "name": info.run_name or info.run_id,
        "status": info.status,
        "diverged": diverged,
        **{key: reached.get(key) for key in FINALS},
        "layers": summary.get("layers"),
        **{key: len(summary[key]) if key in summary else None for key in EVENTS},
    }
    if not finished or diverged:
        final["val_loss"] = None
    timeline = [identity | _event(record, event) for key, event in EVENTS.items() for record in summary.get(key, [])]
    timeline.sort(key=lambda row: row["budget_fraction"])
    return {"curves": curves, "finals": [final], "timeline": timeline}


def _series(client: "MlflowClient", run: "Run", prefix: str, keys: Iterable[str]) -> list[dict[str, Any]]:
    """A run's metrics as points, by step; of a point that was sent twice, the later sending."""
    points: dict[int, dict[str, Any]] = {}
    for key in keys:
        if prefix + key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, prefix + key)
            for metric in sorted(history, key=lambda metric: (metric.step, metric.timestamp)):
                points.setdefault(metric.step, {"steps": metric.step})[key] = metric.value
    return [points[step] for step in sorted(points)]


def _event(record: dict[str, Any], event: str) -> dict[str, Any]:
    """A row of the timeline; a rollback names the graft that went with it in `removed`, as `BLUEPRINT at SITE`."""
    blueprint, _, site = (record.get("removed") or "").partition(" at ")
    removed = {"blueprint": blueprint or None, "site": site or None} if event == "rollback" else {}
    return {"event": event} | {key: record.get(key) for key in (*EVENT, *CHANGE)} | removed


def _frame(name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of one table, with its columns and their types whatever the rows lack."""
    frame = pd.DataFrame(rows, columns=COLUMNS[name])
    for column in frame.columns:
        if column in (*COUNTS, *COUNTS_CHANGED):
            frame[column] = frame[column].astype("Float64").astype("Int64")
        elif column == "seed":
            frame[column] = frame[column].astype("int64")
        elif column == "diverged":
            frame[column] = frame[column].astype(bool)
        elif column in ("budget_fraction", "wall_seconds", "val_loss", *COSTS, *CHANGE):
            frame[column] = frame[column].astype("float64")
        else:
            texts = frame[column].astype("object")
            frame[column] = texts.where(texts.notna(), None)
    return frame
