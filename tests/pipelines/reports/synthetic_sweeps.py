"""Sweeps made up by a law, as the tables that MLflow would give: what the verdict has to say about them is known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from esper.pipelines.reports.claims import Claim
from esper.pipelines.reports.envelope import TrialRun, read_runs
from esper.pipelines.reports.opponents import OPPONENTS, Bench
from esper.pipelines.reports.tables import AXES, Tables

BUDGET = 1e6
TEST_SEEDS = (1, 2, 3, 4, 5)
TUNING_SEEDS = (101, 102)


@dataclass
class SyntheticSweep:
    """A sweep whose truth is known.

    A run that ends at loss L would have ended at L + slope·(share^-power − 1) after a share of its cost.

    Attributes:
        statics: size → true loss at the end of the budget.
        grown: label → true final loss.
        final_size: true loss of every `static_final:<label>`.
        slope, power: of that law; all axes of a run grow in proportion.
        forks: shares of the annealed points before the end.
        cost: label → axis → final cost, where it is not `final_cost`'s own.
        seeds, tuning_seeds: of the test and the tuning runs.
    """

    statics: dict[int, float] = field(default_factory=lambda: {1: 1.4, 2: 1.2, 3: 1.25, 4: 1.4})
    grown: dict[str, float] = field(default_factory=lambda: {"tamiyo": 1.2, "onejump": 1.3})
    final_size: float = 1.5
    slope: float = 0.3
    power: float = 0.5
    forks: tuple[float, ...] = (0.25, 0.5, 0.75)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    seeds: tuple[int, ...] = TEST_SEEDS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS

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

    def tables(self, shift: np.ndarray | None = None) -> Tables:
        """Its tables.

        Args:
            shift: what is added to each run's losses, nats (rows of `finals`,); none if not given.
        """
        finals, curves = [], []
        counts = {"steps": 100, "prunes": 0, "rollbacks": 0, "layers": 2}
        for label, truth in self.truths().items():
            arm = label.split(":")[0].split("-")[0]
            chooses = arm == "static" or label in self.grown
            cost = self.final_cost(label)
            for seed in (*self.seeds, *(self.tuning_seeds if chooses else ())):
                end = truth + (0.0 if shift is None else float(shift[len(finals)]))
                run = {
                    "run_id": f"{label}/{seed}",
                    "label": label,
                    "arm": arm,
                    "size": int(label[-1]) if arm == "static" else pd.NA,
                    "seed": seed,
                    "purpose": "test" if seed in self.seeds else "tuning",
                    "grid": "{}",
                    "parameters": 1000 * int(label[-1]) if arm == "static" else 999,
                }
                counts["grafts"] = int(label in self.grown)
                whole = {"sweep": "s", "name": f"{label}-{seed}", "status": "FINISHED", "diverged": False}
                finals.append(run | whole | counts | cost | {"wall_seconds": 9.0, "val_loss": end})
                for share in (*self.forks, 1.0):
                    loss = end + self.slope * (share**-self.power - 1)
                    at = {"budget_fraction": share, "steps": int(100 * share)} | {a: cost[a] * share for a in AXES}
                    curves.append(run | at | {"kind": "annealed", "val_loss": loss})
                    curves.append(run | at | {"kind": "decision", "val_loss": loss + 0.1})
        frames = [pd.DataFrame(rows).astype({"size": "Int64"}) for rows in (curves, finals)]
        return Tables(frames[0], frames[1], self.timeline())

    def timeline(self) -> pd.DataFrame:
        """One sound graft in each grown test run."""
        graft = {"purpose": "test", "grid": "{}", "event": "graft", "budget_fraction": 0.5, "optimizer_step": 50}
        graft |= {"site": "trunk", "blueprint": "block", "outcome": "kept"}
        graft |= {
            "parameters_before": 500,
            "parameters_after": 1000,
            "val_loss_before": 1.5,
            "val_loss_after": 1.500001,
        }
        runs = [(label, seed) for label in self.grown for seed in self.seeds]
        return pd.DataFrame({"run_id": f"{label}/{seed}", "label": label, "seed": seed} | graft for label, seed in runs)

    def point(self, size: int | None = 2) -> dict[str, Any]:
        """The entry of `sweep["points"]`."""
        return {
            "grid": "{}",
            "budget": {"axis": "parameter_seconds", "amount": BUDGET},
            "spec": {"budget": {"interior": [1e5, 1e7]}},
            "size": size,
            "schedule": "onejump",
        }

    def sweep(self) -> dict[str, Any]:
        """`sweep.json`, nothing wrong with it."""
        return {
            "arms": list(self.truths()),
            "sizes": list(self.statics),
            "seeds": list(self.seeds),
            "tuning_seeds": list(self.tuning_seeds),
            "rates_tuned": True,
            "points": [self.point()],
            "controller": None,
            "trials": {},
        }


def with_noise(runs: Sequence[TrialRun], shift: np.ndarray) -> list[TrialRun]:
    """Each run's losses, final and annealed, shifted by its own amount of nats (runs,)."""
    return [
        replace(
            run,
            loss=run.loss + nats,
            points={axis: (costs, losses + nats) for axis, (costs, losses) in run.points.items()},
        )
        for run, nats in zip(runs, shift.tolist(), strict=True)
    ]


def chosen_on_tuning(runs: Sequence[TrialRun]) -> int:
    """The size with the lowest mean final loss on tuning seeds, as a sweep chooses it."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        if run.purpose == "tuning" and run.size is not None:
            losses.setdefault(run.size, []).append(run.loss)
    return min(losses, key=lambda size: float(np.mean(losses[size])))


def simulate(sweep: SyntheticSweep, noise: float, sweeps: int) -> Iterator[Bench]:
    """Draw sweeps; the best size is chosen on each one's own tuning seeds.

    Args:
        sweep: the truth.
        noise: standard deviation of a run's losses, nats.
        sweeps: how many.
    """
    rng = np.random.default_rng(20260101)
    truth = read_runs(sweep.tables(), "{}")
    for _ in range(sweeps):
        runs = with_noise(truth, rng.normal(0, noise, len(truth)))
        yield Bench(runs, sweep.point(size=chosen_on_tuning(runs)))


def own_claims(bench: Bench) -> list[Claim]:
    """The claims on the budget's axis."""
    return [claim for opponent in OPPONENTS for claim in bench.claims(opponent, bench.axis)]
