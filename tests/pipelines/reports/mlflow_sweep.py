"""Fills a real MLflow store with a sweep that was never run: its losses follow a law, its answers are known.

    python tests/pipelines/reports/mlflow_sweep.py sqlite:///mlflow.db        # then: esper report

Everything that a sweep logs is there, under the same names. A static GPT of n layers ends at
`FLOOR + A / N^0.35 + B / tokens^0.35`; a grown one at what its path through the sizes gives, plus what it was told.
"""

import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

FLOOR, A, B = 1.0, 8.0, 70.0
DECISIONS = 8
FORKS = (0.2, 0.4, 0.65)  # budget fractions of the cooldowns
BUDGET = 1e6  # parameter-seconds
NOISE = 0.004  # nats, of a run
LEDGER = ("steps", "tokens", "flops", "seconds", "wall_seconds", "parameter_seconds")
PROVENANCE = {
    "commit": "abc1234",
    "hardware": "AMD EPYC 7B13, 2 core(s)",
    "versions": "Python 3.12.3, torch 2.13.0",
    "data": "tinystories, char, 9,000 training tokens",
}
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101, 102)

Growth = Sequence[tuple[float, str, str]]  # (budget fraction, blueprint, site), in order


@dataclass(frozen=True)
class Arm:
    """What is run: `gain` is by how much its final loss lies below its law, in nats."""

    label: str
    arm: str
    size: int | None
    growth: Growth = ()
    gain: float = 0.0
    layers: int | None = None  # at the end; for the arms that were told a shape


STATIC = tuple(Arm(f"static-{n}", "static", n) for n in (1, 2, 3, 4))
GROWN = (
    Arm("onejump", "onejump", 1, ((0.4, "block", "layer 1"),), 0.01),
    Arm("gradual", "gradual", 1, ((0.15, "block", "layer 1"), (0.5, "block", "layer 2")), -0.01),
    Arm("tamiyo", "tamiyo", 1, ((0.2, "ffn", "layer 0"), (0.35, "block", "layer 1")), 0.03),
    Arm("ppo", "ppo", 1, ((0.1, "attention", "layer 0"), (0.3, "block", "layer 1"), (0.6, "ffn", "layer 1")), 0.0),
    Arm("random:tamiyo", "random", 1, ((0.1, "block", "layer 0"), (0.7, "ffn", "layer 1")), -0.03),
)
ENDED = (
    Arm("static_final:tamiyo", "static_final", None, layers=2),
    Arm("static_final:ppo", "static_final", None, layers=2),
    Arm("static_final:onejump", "static_final", None, layers=2),
)
ADDED = {"block": 12_000, "ffn": 4_200, "attention": 4_100}  # parameters


@dataclass
class Logged:
    """What was put into the store.

    Attributes:
        parent: run id.
        sweep: `sweep.json`.
        summaries: by trial name, of the runs that ended.
        points: by trial name, the decisions' metrics.
        run_ids: by trial name.
    """

    parent: str
    sweep: dict[str, Any]
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    run_ids: dict[str, str] = field(default_factory=dict)


def fill(
    client: MlflowClient,
    artifacts: Path,
    *,
    experiment: str = "esper-tinystories",
    name: str = "sweep-20260101-120000",
    static: Sequence[Arm] = STATIC,
    arms: Sequence[Arm] = GROWN + ENDED,
    seeds: Sequence[int] = SEEDS,
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
    grids: Sequence[dict[str, Any]] = ({},),
    budget: tuple[str, float] = ("parameter_seconds", BUDGET),
    rates_tuned: bool = True,
    interior: list[float] | None = None,
    controller: dict[str, Any] | None = None,
    failed: Sequence[str] = (),
    diverged: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> Logged:
    """Log a sweep.

    Args:
        client: of the store.
        artifacts: folder for the experiment's artifacts, where it is made here.
        experiment: its name; gone on with where it exists.
        name: of the parent run.
        static: sizes; they run on the tuning seeds as well.
        arms: all others.
        seeds: test seeds.
        tuning_seeds: as the name says.
        grids: grid points; `budget.amount` is heeded.
        budget: axis (parameter_seconds or steps) and amount.
        rates_tuned: what sweep.json says of it.
        interior: `spec["budget"]["interior"]`.
        controller: sweep.json's.
        failed: names of trials that ended in the middle.
        diverged: names of trials that the governor gave up.
        missing: names of trials that never started.
    """
    found = client.get_experiment_by_name(experiment)
    folder = artifacts.absolute().as_uri()
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, folder)
    parent = client.create_run(
        experiment_id,
        tags={"kind": "sweep", "preset": "tinystories-char", "esper.key": name, **PROVENANCE},
        run_name=name,
    ).info.run_id
    points = [_point(grid, budget, rates_tuned, interior) for grid in grids]
    logged = Logged(parent, {})
    trials = {}
    for point, grid in zip(points, grids, strict=True):
        planned = [(arm, seed, "test") for arm in (*static, *arms) for seed in seeds]
        planned += [(arm, seed, "tuning") for arm in (*static, *arms[:2]) for seed in tuning_seeds]
        for arm, seed, purpose in planned:
            at = "" if not grid else "-" + "-".join(f"{value:g}" for value in grid.values())
            trial = f"{arm.label}-{purpose}{at}-seed{seed}"
            status = next(
                (s for s, of in (("failed", failed), ("missing", missing)) if trial in of),
                "done",
            )
            trials[trial] = {
                "label": arm.label,
                "arm": arm.arm,
                "size": arm.size,
                "seed": seed,
                "purpose": purpose,
                "grid": point["grid"],
                "status": status,
                "error": "OSError: no space left on the device" if status == "failed" else None,
            }
            if status != "missing":
                _log_trial(client, experiment_id, logged, trial, trials[trial], arm, point, trial in diverged)
    logged.sweep |= {
        "arms": [arm.label for arm in (*static, *arms)],
        "sizes": [arm.size for arm in static],
        "seeds": list(seeds),
        "tuning_seeds": list(tuning_seeds),
        "rates_tuned": rates_tuned,
        "points": points,
        "controller": controller,
        "command": ["esper", "sweep", "--arms", "static,ppo & more"],
        "trials": trials,
    }
    client.log_batch(parent, params=[Param("budget.axis", budget[0]), Param("budget.amount", str(budget[1]))])
    client.log_dict(parent, logged.sweep, "sweep.json")
    client.log_dict(parent, points[0]["spec"], "spec.json")
    client.set_terminated(parent, "FINISHED")
    return logged


def _point(
    grid: dict[str, Any], whole: tuple[str, float], rates_tuned: bool, interior: list[float] | None
) -> dict[str, Any]:
    budget = {"axis": whole[0], "amount": grid.get("budget.amount", whole[1])}
    spec = {
        "preset": "tinystories-char",
        "host": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64},
        "data": {"source": "tinystories", "tokenizer": "char", "batch_size": 16},
        "clock": {"kind": "reference", "measured_on": "AMD EPYC (Zen 3) core, 1 thread"},
        "budget": {**budget, "decisions": DECISIONS, "interior": interior, "cooldowns": list(FORKS)},
        "device": "cpu",
    }
    rates = {"1": 0.02, "2": 0.015, "3": 0.01, "4": 0.008} if rates_tuned else None
    curve = {"learning_rate": 0.012, "rate_exponent": 0.45, "rate_parameters": 25000} if rates_tuned else None
    return {
        "grid": json.dumps(grid, sort_keys=True),
        "budget": budget,
        "spec": spec,
        "rates": rates,
        "curve": curve,
        "size": 2,
        "schedule": "onejump",
    }


def _log_trial(
    client: MlflowClient,
    experiment_id: str,
    logged: Logged,
    name: str,
    trial: dict[str, Any],
    arm: Arm,
    point: dict[str, Any],
    diverged: bool,
) -> None:
    tags = {key: trial[key] for key in ("arm", "label", "seed", "purpose", "grid")} | {
        "kind": "trial",
        "preset": "tinystories-char",
        "commit": "abc1234",
        "esper.key": name,
        "mlflow.parentRunId": logged.parent,
    }
    if arm.size is not None:
        tags["size"] = arm.size
    if diverged:
        tags["diverged"] = "true"
    run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    logged.run_ids[name] = run_id
    failed = trial["status"] == "failed"
    points, forks, grafts = _simulate(arm, trial["seed"], **point["budget"])
    if failed or diverged:
        points, forks = points[: DECISIONS // 2], forks[:1]
    logged.points[name] = points
    metrics = [(key, value, int(p["steps"])) for p in points for key, value in p.items()]
    metrics += [
        (f"annealed/{key}", p[key], int(p["steps"]))
        for p in forks
        for key in ("val_loss", "budget_fraction", "parameter_seconds", "tokens", "flops", "seconds")
    ]
    metrics += [("grid/val_loss", p["val_loss"], k) for k, p in enumerate(points)]
    axis = point["budget"]["axis"]
    metrics += [(f"grid/{axis}", p[axis], k) for k, p in enumerate(points)]
    client.log_batch(run_id, metrics=[Metric(key, value, 1_700_000_000_000, step) for key, value, step in metrics])
    client.log_dict(run_id, point["spec"], "spec.json")
    if failed:
        client.set_terminated(run_id, "FAILED")
        return
    last = points[-1]
    summary = {
        "arm": arm.arm,
        "seed": trial["seed"],
        "diverged": diverged,
        "failure": "the loss was not finite" if diverged else None,
        "parameters": last["parameters"],
        "layers": _layers(arm, last["budget_fraction"]),
        "val_loss": last["val_loss"],
        **{axis: last[axis] for axis in LEDGER},
        "grafts": [graft for graft in grafts if graft["budget_fraction"] < last["budget_fraction"]],
        "prunes": [_prune(grafts[0])] if arm.label == "ppo" and trial["seed"] % 2 == 0 and grafts else [],
        "rollbacks": [_rollback(grafts[-1])] if arm.label == "ppo" and trial["seed"] == 1 and grafts else [],
        "annealed": forks,
        "val_curve": points,
    }
    logged.summaries[name] = summary
    client.log_dict(run_id, summary, "summary.json")
    client.set_terminated(run_id, "FINISHED")


def _simulate(
    arm: Arm, seed: int, axis: str, amount: float
) -> tuple[list[dict[str, float]], list[dict[str, float]], list[Any]]:
    """(Decisions, cooldown forks, grafts) of one run."""
    paired = np.random.default_rng(seed).normal(0, 0.02)
    own = np.random.default_rng([seed, zlib.crc32(arm.label.encode())])
    size = arm.layers or arm.size or 1
    moved = [(max(0.02, at + own.normal(0, 0.015)), blueprint, site) for at, blueprint, site in arm.growth]
    shift = paired + own.normal(0, NOISE) - arm.gain
    at = {"steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "wall_seconds": 0.0, "parameter_seconds": 0.0}
    points, forks, grafts = [], [], []
    parameters, used = 12_000 * size + 4_000, 0.0
    stops = sorted({*(k / DECISIONS for k in range(DECISIONS + 1)), *FORKS, *(at for at, _, _ in moved)})
    for stop in stops:
        layers = max(1, round((parameters - 4_000) / 12_000))
        step = 0.0019 + 2e-4 * layers  # seconds
        steps = math.ceil((stop - used) * amount / (1 if axis == "steps" else parameters * step) - 1e-9)
        at = {
            "steps": at["steps"] + steps,
            "tokens": at["tokens"] + 1024 * steps,
            "flops": at["flops"] + 6.0 * parameters * 1024 * steps,
            "seconds": at["seconds"] + step * steps,
            "wall_seconds": at["wall_seconds"] + 1.07 * step * steps,
            "parameter_seconds": at["parameter_seconds"] + parameters * step * steps,
        }
        used = at[axis] / amount
        annealed = FLOOR + A / parameters**0.35 + B / (at["tokens"] + 2e4) ** 0.35 + shift
        loss = annealed + 0.25 * max(0.0, 1 - used)
        point = {"budget_fraction": used, **at, "parameters": parameters, "val_loss": loss}
        if stop in FORKS:
            forks.append({**point, "val_loss": annealed})
        if math.isclose(stop * DECISIONS, round(stop * DECISIONS)):
            points.append({**point, "perplexity": math.exp(loss), "learning_rate": 0.01 * max(0.0, 1 - used)})
        for planned, blueprint, site in moved:
            if planned == stop:
                grafts.append(_graft(used, at["steps"], blueprint, site, parameters, loss))
                parameters += ADDED[blueprint]
    if grafts and arm.label == "ppo":
        grafts[0]["outcome"] = "pruned" if seed % 2 == 0 else "kept"
        grafts[-1]["outcome"] = "rolled back" if seed == 1 else None
    return points, forks, grafts


def _graft(used: float, steps: int, blueprint: str, site: str, parameters: int, loss: float) -> dict[str, Any]:
    return {
        "budget_fraction": used,
        "decision": int(used * DECISIONS),
        "optimizer_step": steps,
        "site": site,
        "blueprint": blueprint,
        "parameters_before": parameters,
        "parameters_after": parameters + ADDED[blueprint],
        "val_loss_before": loss,
        "val_loss_after": loss,
        "reason": "the loss has stopped falling",
        "outcome": "kept",
    }


def _prune(graft: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in graft.items() if key != "outcome"}
    return kept | {
        "budget_fraction": graft["budget_fraction"] + 0.2,
        "parameters_before": graft["parameters_after"],
        "parameters_after": graft["parameters_before"],
    }


def _rollback(graft: dict[str, Any]) -> dict[str, Any]:
    return {
        "budget_fraction": graft["budget_fraction"] + 0.05,
        "decision": graft["decision"] + 1,
        "optimizer_step": graft["optimizer_step"] + 40,
        "fault": "the loss was not finite",
        "removed": f"{graft['blueprint']} at {graft['site']}",
    }


def _layers(arm: Arm, until: float) -> int:
    blocks = sum(1 for at, blueprint, _ in arm.growth if blueprint == "block" and at < until)
    return (arm.layers or arm.size or 1) + blocks


def noise() -> Iterator[str]:
    """What other programs leave in an experiment: names of runs that no report may trip over."""
    yield from ("train-20250101-000000", "static-seed0", "<script>alert(1)</script>")


def add_foreign(client: MlflowClient, experiment: str, parent: str | None = None) -> list[str]:
    """Runs of other kinds and ages: no tags, half the tags, no summary; their run ids."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    tags: list[dict[str, str]] = [
        {},
        {"arm": "static", "seed": "0", "preset": "demo"},
        {"kind": "trial", "arm": "static", "label": "static-1", "seed": "none", "purpose": "test", "grid": "{}"},
    ]
    ids = []
    for name, own in zip(noise(), tags, strict=True):
        linked = {"mlflow.parentRunId": parent} if parent else {}
        run_id = client.create_run(found.experiment_id, tags=own | linked, run_name=name).info.run_id
        client.log_metric(run_id, "val_loss", 1.0, step=3)
        client.set_terminated(run_id, "FINISHED")
        ids.append(run_id)
    return ids


if __name__ == "__main__":
    store = MlflowClient(sys.argv[1])
    grown = {"checkpoint": "runs/ppo", "trained_on": "laws", "parameter_seconds": 3e6, "wall_seconds": 5400.0}
    print(fill(store, Path("mlruns/esper-tinystories"), interior=[2e5, 3e6], controller=grown).parent)
