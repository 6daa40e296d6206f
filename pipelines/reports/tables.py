"""A sweep as three tables: what the verdict is drawn from, and what a notebook gets."""

from dataclasses import dataclass

import pandas as pd

AXES = ("parameter_seconds", "flops", "seconds", "tokens")  # what a run costs, each counted from its first step


@dataclass(frozen=True)
class Tables:
    """Every trial of a sweep, long form.

    Losses are nats per token on the fixed held-out set; costs are totals since the run's first step; `size` is the
    number of layers it starts with (Int64, NA where the arm has none); `purpose` is rates, tuning or test; `grid` is
    JSON text of the grid point.

    Attributes:
        curves: a row per point of a run: run_id, label, arm, size, seed, purpose, grid, kind, budget_fraction, steps,
            tokens, flops, seconds, parameter_seconds, parameters, val_loss. `kind` is "decision" (in mid-run, learning
            rate not annealed: never compared) or "annealed" (a cooldown fork, or the end of a run that was finished
            and did not diverge).
        finals: a row per trial: sweep, run_id, name, arm, label, size, seed, purpose, grid, status (MLflow's: FINISHED
            where it ran to its end), diverged (the governor gave it up), val_loss, parameter_seconds, flops, seconds,
            tokens, steps, wall_seconds, parameters, layers, grafts, prunes, rollbacks (the last three counts).
        timeline: a row per change of a network: run_id, label, seed, purpose, grid, event ("graft", "prune" or
            "rollback"), budget_fraction, optimizer_step, site, blueprint, outcome, parameters_before,
            parameters_after, val_loss_before, val_loss_after.
    """

    curves: pd.DataFrame
    finals: pd.DataFrame
    timeline: pd.DataFrame
