"""The runs of a sweep, each from its tags and its `summary.json`; the same as data frames, for notebooks."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

AXES = ("parameter_seconds", "flops", "seconds", "tokens")  # what a run costs, each counted from its first step
FINAL = (*AXES, "steps", "wall_seconds", "parameters")
NEAR = 0.02  # costs and budgets that differ by less than this are equal: a run ends at the first step past its budget
EVENTS = {"grafts": "graft", "prunes": "prune", "rollbacks": "rollback"}
NEEDED = {"val_loss", *FINAL, *EVENTS, "layers", "annealed", "val_curve"}  # of a summary

IDENTITY = ("run_id", "label", "arm", "size", "seed", "purpose", "grid")
END = ("status", "diverged", "val_loss", *FINAL, "layers", *EVENTS)
CURVE = ("kind", "budget_fraction", "steps", *AXES, "parameters", "val_loss")
SIZES = ("parameters_before", "parameters_after")
LOSSES = ("val_loss_before", "val_loss_after")
CHANGE = ("event", "budget_fraction", "optimizer_step", "site", "blueprint", "outcome", *SIZES, *LOSSES)
INTEGERS = ("size", "steps", "parameters", "layers", "optimizer_step", *SIZES, *EVENTS)
FLOATS = ("budget_fraction", "wall_seconds", "val_loss", *LOSSES, *AXES)
TYPES = dict.fromkeys(INTEGERS, "Int64") | dict.fromkeys(FLOATS, "float64")


@dataclass(frozen=True)
class Run:
    """One trial of a sweep: tags and status in MLflow, and `summary.json` (of a run that did not end, its metrics)."""

    run_id: str
    sweep: str
    name: str
    label: str
    arm: str
    size: int | None  # layers at the start
    seed: int
    purpose: str  # rates, tuning or test
    grid: str  # JSON text of the grid point
    status: str
    summary: dict[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether the governor gave it up."""
        return bool(self.summary.get("diverged"))

    @property
    def loss(self) -> float:
        """At its end, nats per token; NaN if it did not end or diverged."""
        return math.nan if self.status != "FINISHED" or self.diverged else self.final("val_loss")

    @property
    def sound(self) -> bool:
        """Whether it ran to its end and did not diverge; only such runs are compared."""
        return math.isfinite(self.loss)

    @property
    def grafts(self) -> int:
        """How often it grew."""
        return len(self.summary.get("grafts", ()))

    def final(self, what: str) -> float:
        """A number of its summary, NaN where that has none."""
        value = self.grafts if what == "grafts" else self.summary.get(what)
        return math.nan if value is None else float(value)

    @cached_property
    def annealed(self) -> list[dict[str, Any]]:
        """Its cooldown forks, and its end: only annealed losses are compared."""
        forks = [point for point in self.summary.get("annealed", ()) if point.get("val_loss") is not None]
        return [*forks, {"budget_fraction": 1.0} | self.summary] if self.sound else forks

    def points(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Costs (points,), increasing, and annealed losses (points,)."""
        pairs = sorted((p[axis], p["val_loss"]) for p in self.annealed if (p.get(axis) or 0) > 0)
        costs, losses = np.array(pairs, float).reshape(-1, 2).T
        return costs, losses

    def loss_at(self, axis: str, cost: np.ndarray | float) -> np.ndarray:
        """Annealed loss at costs of any shape, linear in log cost between two points; NaN outside them.

        For a loss a + b·cost^-c it is too high by at most b·cost^-c·(c·h)²/8, h the points' distance in log cost.
        """
        costs, losses = self.points(axis)
        if not len(costs):
            return np.full(np.shape(cost), np.nan)
        outside = (np.asarray(cost) < costs[0] / (1 + NEAR)) | (np.asarray(cost) > costs[-1] * (1 + NEAR))
        return np.where(outside, np.nan, np.interp(np.log(cost), np.log(costs), losses))

    def events(self) -> list[dict[str, Any]]:
        """Each change of the network; a rollback's `removed` (`BLUEPRINT at SITE`) gives its blueprint and site."""
        found = []
        for key, event in EVENTS.items():
            for record in self.summary.get(key, ()):
                blueprint, _, site = (record.get("removed") or "").partition(" at ")
                found.append({"event": event, "blueprint": blueprint or None, "site": site or None} | record)
        return sorted(found, key=lambda event: event["budget_fraction"])


Seeds = Mapping[int, Run]  # a label's runs by seed


@dataclass(frozen=True)
class Tables:
    """Every trial of a sweep, long form; losses in nats per token, costs since the run's first step."""

    finals: pd.DataFrame  # a row per trial; `val_loss` is empty where it failed or `diverged`
    curves: pd.DataFrame  # a row per point; `kind` is "decision" (rate not annealed: never compared) or "annealed"
    timeline: pd.DataFrame  # a row per change of a network; `event` is "graft", "prune" or "rollback"


def tables(runs: Iterable[Run]) -> Tables:
    """The runs as data frames."""
    finals, curves, timeline = [], [], []
    for run in runs:
        own = {name: getattr(run, name) for name in IDENTITY}
        counts = {name: len(run.summary[name]) for name in EVENTS if name in run.summary}
        named = {name: getattr(run, name) for name in ("sweep", "name", "status", "diverged")}
        finals.append(run.summary | own | named | {"val_loss": run.loss} | counts)
        curves += [point | own | {"kind": "decision"} for point in run.summary.get("val_curve", ())]
        curves += [point | own | {"kind": "annealed"} for point in run.annealed]
        timeline += [event | own for event in run.events()]

    def frame(rows: list[dict[str, Any]], *columns: str) -> pd.DataFrame:
        types: Any = {name: TYPES[name] for name in columns if name in TYPES}
        return pd.DataFrame(rows).reindex(columns=columns).astype(types)

    return Tables(
        finals=frame(finals, "sweep", "name", *IDENTITY, *END),
        curves=frame(curves, *IDENTITY, *CURVE),
        timeline=frame(timeline, *IDENTITY, *CHANGE),
    )
