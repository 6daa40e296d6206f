"""Sweeps made up by a law: what the verdict has to say of them is known. Also fills real MLflow stores with them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient

from esper.pipelines.reports.paired_tests import Trials
from esper.pipelines.reports.runs import AXES, Run

BUDGET = 1e6
PROVENANCE = {"commit": "abc1234", "hardware": "AMD EPYC, 2 core(s)", "versions": "torch 2.13.0", "data": "stories"}
FAILED: dict[str, Any] = {"failed": True}


@dataclass
class SyntheticSweep:
    """A run that ends at loss L would have ended at L + slope·(share^-power − 1) after a share of its cost."""

    # Size, or label → true final loss.
    statics: dict[int, float] = field(default_factory=lambda: {1: 1.4, 2: 1.2, 3: 1.25, 4: 1.4})
    grown: dict[str, float] = field(default_factory=lambda: {"tamiyo": 1.2, "onejump": 1.3})
    final_size: float = 1.5  # of every `static_final:<label>`
    slope: float = 0.3
    power: float = 0.5
    forks: tuple[float, ...] = (0.25, 0.5, 0.75)  # shares of the annealed points before the end
    cost: dict[str, dict[str, float]] = field(default_factory=dict)  # label → axis, where not `final_cost`'s own
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seeds: tuple[int, ...] = (101, 102)
    idle: tuple[str, ...] = ()  # labels that never graft
    # Label, or (label, seed) of a test run → what its summary says instead, or FAILED.
    edits: dict[Any, dict[str, Any]] = field(default_factory=dict)
    grid: str = "{}"

    def truths(self) -> dict[str, float]:
        """Label → true final loss."""
        finals = {f"static_final:{arm}": self.final_size for arm in self.grown}
        return {**{f"static-{n}": loss for n, loss in self.statics.items()}, **self.grown, **finals}

    def final_cost(self, label: str) -> dict[str, float]:
        """By axis: a static of n layers takes 1/n of the budget's seconds; all others as if they had two layers."""
        layers = int(label.removeprefix("static-")) if label.startswith("static-") else 2
        seconds = BUDGET / layers
        own = {"flops": 1e6 * seconds, "seconds": seconds, "tokens": 1e3 * seconds / layers}
        return {"parameter_seconds": BUDGET} | own | self.cost.get(label, {})

    def runs(self, noise: float = 1e-4) -> list[Run]:
        """Its runs, each with its own noise (standard deviation, nats)."""
        rng = np.random.default_rng(0)
        return [
            self._run(label, seed, truth + float(rng.normal(0, noise or 1e-99)))
            for label, truth in self.truths().items()
            for seed in (*self.seeds, *(self.tuning_seeds if "static_final" not in label else ()))
        ]

    def _run(self, label: str, seed: int, end: float) -> Run:
        size = int(label[-1]) if label.startswith("static-") else None
        cost, test, points = self.final_cost(label), seed in self.seeds, []
        for share in (*self.forks, 1.0):
            at = {axis: cost[axis] * share for axis in AXES} | {"steps": int(100 * share), "budget_fraction": share}
            points.append(at | {"parameters": 1000, "val_loss": end + self.slope * (share**-self.power - 1)})
        grows = label in self.grown and label not in self.idle
        summary = {**points[-1], "val_loss": end, "layers": size or 2, "diverged": False, "failure": None}
        summary |= {"parameters": 1000 * size if size else 999, "prunes": [], "rollbacks": []}
        summary |= {"grafts": [graft()] if grows else [], "annealed": points[:-1]}
        summary["val_curve"] = [point | {"val_loss": point["val_loss"] + 0.1} for point in points]
        edits = [self.edits[key] for key in (label, (label, seed)) if test and key in self.edits]
        for edit in edits:
            summary |= edit
        purpose, name, arm = "test" if test else "tuning", f"{label}-{seed}", label.split(":")[0].split("-")[0]
        status, summary = ("FAILED", {}) if FAILED in edits else ("FINISHED", summary)
        return Run(name, "s", name, label, arm, seed, purpose, self.grid, status, summary, size)

    def point(self, **changes: Any) -> dict[str, Any]:
        """The entry of `sweep["points"]`."""
        budget, clock = {"axis": "parameter_seconds", "amount": BUDGET}, {"kind": "reference", "measured_on": "a core"}
        own = {
            "grid": self.grid,
            "budget": budget,
            "spec": {"clock": clock, "host": {}},
            "size": 2,
            "schedule": "onejump",
        }
        return own | changes

    def sweep(self, **changes: Any) -> dict[str, Any]:
        """`sweep.json`, nothing wrong with it."""
        own = {"arms": list(self.truths()), "sizes": list(self.statics), "points": [self.point()], "trials": {}}
        own |= {"seeds": list(self.seeds), "tuning_seeds": list(self.tuning_seeds), "rates_tuned": True}
        return own | {"command": ["esper", "sweep", "--arms", "static,ppo & more"]} | changes


def graft(**changes: Any) -> dict[str, Any]:
    """A sound one."""
    at = {"budget_fraction": 0.5, "optimizer_step": 50, "site": "trunk", "blueprint": "block", "outcome": "kept"}
    sizes = {"parameters_before": 500, "parameters_after": 1000, "val_loss_before": 1.5, "val_loss_after": 1.500001}
    return at | sizes | changes


def simulate(sweep: SyntheticSweep, noise: float, sweeps: int) -> Iterator[Trials]:
    """Draw sweeps; the best size is chosen on each one's own tuning seeds."""
    rng, truth = np.random.default_rng(20260101), sweep.runs(0)
    for _ in range(sweeps):
        runs, tuning = [], {}
        for run, nats in zip(truth, rng.normal(0, noise, len(truth)).tolist(), strict=True):
            forks = [point | {"val_loss": point["val_loss"] + nats} for point in run.summary["annealed"]]
            end = {"val_loss": run.summary["val_loss"] + nats, "annealed": forks}
            runs.append(replace(run, summary=run.summary | end))
            if run.purpose == "tuning" and run.arm == "static":
                tuning[run.size] = tuning.get(run.size, 0.0) + end["val_loss"]
        yield Trials(runs, sweep.point(size=min(tuning, key=tuning.__getitem__)), list(sweep.truths()))


def log(client: MlflowClient, runs: Sequence[Run], sweep: dict[str, Any], name: str = "a-sweep") -> dict[str, str]:
    """Put a sweep into a store as `esper sweep` does; run ids by name."""
    found, files = client.get_experiment_by_name("esper-tinystories"), Path(client.tracking_uri[10:]).parent / "mlruns"
    experiment = found.experiment_id if found else client.create_experiment("esper-tinystories", files.as_uri())
    tags = {"kind": "sweep", "preset": "demo", **PROVENANCE}
    parent = client.create_run(experiment, tags=tags, run_name=name).info.run_id
    ids = {"parent": parent}
    for run in runs:
        own = {key: str(getattr(run, key)) for key in ("arm", "label", "seed", "purpose", "grid")}
        own |= {"kind": "trial", "mlflow.parentRunId": parent} | ({"size": str(run.size)} if run.size else {})
        made = client.create_run(experiment, tags=own, run_name=run.name).info
        if run.summary:
            folder = Path(made.artifact_uri.removeprefix("file://"))
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps(run.summary))  # `log_dict` takes much longer
        client.set_terminated(made.run_id, run.status)
        ids[run.name] = made.run_id
    client.log_dict(parent, sweep, "sweep.json")
    client.set_terminated(parent)
    return ids
