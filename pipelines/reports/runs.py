"""The runs of sweeps as MLflow keeps them, a trial from its tags and `summary.json`; as data frames for notebooks."""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

from esper.platform.deadline import within
from esper.platform.errors import UserError, in_a_sentence, like_a_path, shown, unknown
from esper.platform.tracking_store import connect, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

# What a run costs, each counted from its first step, and how tables call it.
AXES = {"parameter_seconds": "parameter-seconds", "flops": "FLOPs", "seconds": "seconds", "tokens": "tokens"}
NEAR = 0.02  # costs and budgets that differ by less than this are equal: a run ends at the first step past its budget
EVENTS = {"grafts": "graft", "prunes": "prune", "rollbacks": "rollback"}
END = (*AXES, "steps", "parameters", "val_loss")  # of a summary, and of each point of its curve
READERS = 8  # summaries that are downloaded at once
SECONDS = 120.0  # that a store may take in all
MOST = 50_000  # runs, MLflow's limit for one search


@dataclass(frozen=True)
class Run:
    """One trial of a sweep: its tags and status in MLflow, and `summary.json` (empty if it has not ended)."""

    run_id: str
    sweep: str
    name: str
    label: str
    arm: str
    seed: int
    purpose: str  # rates, tuning or test
    grid: str  # JSON text of the grid point
    status: str
    summary: dict[str, Any]
    size: int | None = None  # layers at the start

    @property
    def diverged(self) -> bool:
        return self.summary.get("diverged", False)

    @property
    def sound(self) -> bool:
        """Whether it ran to its end and did not diverge; only such runs are compared."""
        return bool(self.summary) and not self.diverged

    @property
    def loss(self) -> float:
        """At its end, nats per token; NaN if it is not sound."""
        return self.summary["val_loss"] if self.sound else math.nan

    @property
    def grafts(self) -> int:
        return len(self.summary.get("grafts", ()))

    @cached_property
    def annealed(self) -> list[dict[str, Any]]:
        """Its cooldown forks, and its end: only annealed losses are compared."""
        forks = [point for point in self.summary.get("annealed", ()) if point["val_loss"] is not None]
        return [*forks, {"budget_fraction": 1.0, **{key: self.summary[key] for key in END}}] if self.sound else forks

    def points(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Costs (points,), increasing, and annealed losses (points,)."""
        costs, losses = np.array(sorted((p[axis], p["val_loss"]) for p in self.annealed)).reshape(-1, 2).T
        return costs, losses

    def loss_at(self, axis: str, cost: np.ndarray | float) -> np.ndarray:
        """Annealed loss at costs of any shape, linear in log cost between two points; NaN outside them.

        For a loss a + b·cost^-c it is too high by at most b·cost^-c·(c·h)²/8, h the points' distance in log cost.
        """
        costs, losses = self.points(axis)
        outside = (np.asarray(cost) < costs[0] / (1 + NEAR)) | (np.asarray(cost) > costs[-1] * (1 + NEAR))
        return np.where(outside, np.nan, np.interp(np.log(cost), np.log(costs), losses))


Seeds = Mapping[int, Run]  # a label's runs by seed


class Tables(NamedTuple):
    """Every trial of a sweep, long form; losses in nats per token, costs since the run's first step."""

    finals: pd.DataFrame  # a row per trial; `val_loss` is empty where it failed or `diverged`
    curves: pd.DataFrame  # a row per point; `kind` is "decision" (rate not annealed: never compared) or "annealed"
    timeline: pd.DataFrame  # a row per change of a network; `event` is "graft", "prune" or "rollback"


def tables(runs: Iterable[Run]) -> Tables:
    """The runs as data frames."""
    finals, curves, timeline = [], [], []
    for run in runs:
        own = asdict(run)
        summary = own.pop("summary")
        plain = {key: value for key, value in summary.items() if not isinstance(value, (dict, list))}
        counts = {key: len(summary.get(key, ())) for key in EVENTS}
        finals.append({**own, **plain, **counts, **own, "diverged": run.diverged, "val_loss": run.loss})
        for kind, points in (("decision", summary.get("val_curve", ())), ("annealed", run.annealed)):
            curves += [{**own, "kind": kind, **point} for point in points]
        for key, event in EVENTS.items():
            changes = summary.get(key, ())
            timeline += [{**own, "event": event, "blueprint": c.get("removed"), **c} for c in changes]
    timeline.sort(key=itemgetter("label", "seed", "name", "budget_fraction"))
    return Tables(pd.DataFrame(finals), pd.DataFrame(curves), pd.DataFrame(timeline))


class Sweep(NamedTuple):
    """A sweep's parent run, and its trials."""

    client: "MlflowClient"
    run_id: str
    name: str
    experiment: str
    record: dict[str, Any]  # its `sweep.json`
    runs: list[Run]
    provenance: dict[str, str]  # its tags, and where it is


def read_sweeps(uri: str | None, experiment: str | None, wanted: str | None, *, newest: bool = False) -> list[Sweep]:
    """The sweeps of an experiment (None: all) and a run id or name (None: any), newest first, or only the newest.

    UserError where the store is not there or does not answer, holds no such sweep, or no trial has finished.
    """
    address = tracking_uri(uri)
    folder, file = address.removeprefix("file://").removeprefix("file:"), sqlite_file(address)
    is_there = "://" in folder or any(Path(folder).glob("*/meta.yaml"))
    if not (is_there if file is None else file.is_file() and file.stat().st_size):  # MLflow would make a new one
        mend = "give --tracking-uri, set MLFLOW_TRACKING_URI, or run this where the sweep was run."
        raise UserError(f"there is no MLflow store at {shown(address)}: {mend}")
    with in_a_sentence(f"MLflow at {shown(address)} cannot be read", "check --tracking-uri, or MLFLOW_TRACKING_URI"):
        found = within(SECONDS, lambda: list(islice(_find_sweeps(address, experiment, wanted), 1 if newest else None)))
    if not found:
        raise UserError(f"MLflow at {shown(address)} holds no such sweep with a sweep.json: run `esper sweep` first.")
    if not any(run.summary for sweep in found for run in sweep.runs):
        raise UserError("no trial has finished: wait for one, or go on with the sweep (`esper sweep --resume`).")
    return found


def _find_sweeps(address: str, experiment: str | None, wanted: str | None) -> Iterator[Sweep]:
    client = connect(address)
    known = {found.experiment_id: found.name for found in client.search_experiments()}
    if experiment is not None and experiment not in known.values():
        if like_a_path(experiment):
            what = f"{experiment} {'is a path' if Path(experiment).exists() else 'does not exist'}"
            mend = f"one of {', '.join(sorted(known.values()))}; a sweep by --sweep, its folder's name or its run id"
            raise UserError(f"{what}, and `esper report` takes the name of an experiment in MLflow: {mend}.")
        raise unknown("experiment", experiment, known.values())
    ids, order = [id for id, name in known.items() if experiment in (None, name)], ["attributes.start_time DESC"]
    parents = client.search_runs(ids, "tags.kind = 'sweep'", max_results=MOST, order_by=order)
    named = [run for run in parents if wanted in (None, run.info.run_id, run.info.run_name)]
    if parents and not named:
        raise unknown("sweep", wanted, [str(run.info.run_name) for run in parents])
    for run in named:
        if (record := _read_artifact(client, run, "sweep.json")) is None:
            continue
        info, group = run.info, known[run.info.experiment_id]
        its = f"tags.kind = 'trial' AND tags.`mlflow.parentRunId` = '{info.run_id}'"
        trials = client.search_runs([info.experiment_id], its, max_results=MOST, order_by=order)
        with ThreadPoolExecutor(READERS) as pool:
            runs = list(pool.map(partial(_read_run, client), trials))
        where = f"{shown(address)}, experiment {group}, parent run {info.run_id}, {info.status.lower()}"
        tags = {"MLflow": where, **run.data.tags}
        yield Sweep(client, info.run_id, str(info.run_name), group, record, runs, tags)


def _read_run(client: "MlflowClient", run: "MlflowRun") -> Run:
    tags, info, summary = run.data.tags, run.info, _read_artifact(client, run, "summary.json")
    own = {"run_id": info.run_id, "sweep": tags["mlflow.parentRunId"], "name": info.run_name, "status": info.status}
    return Run(**{**tags, **own, "summary": summary or {}})


def _read_artifact(client: "MlflowClient", run: "MlflowRun", name: str) -> dict[str, Any] | None:
    if not any(file.path == name for file in client.list_artifacts(run.info.run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(run.info.run_id, name, folder)
        return json.loads(Path(path).read_text(encoding="utf-8"))
