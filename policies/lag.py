"""Lag tries every graft on a copy, and takes the best (Landscape-Aware Growing, Karp et al. 2024, 2406.02469).

1. Wait for a slope, and then for a decision whose number is a multiple of `patience` of all decisions.
2. Of the legal grafts, keep those that the rest of the budget can train; without any, wait.
3. Wait if the trial would cost more than `cost` of the budget, or last until the rate decays.
4. Train copies for equal `steps` under WAIT and each graft, on the same batches, charged to the run.
5. Take the lowest mean loss over the last `tail` of the steps; of equal ones WAIT.
Equal steps, not equal cost: a graft gains little in its warm-up (`growth.probation_steps`), so WAIT would always win.
A known bias: the host's rate falls as a seed warms up, so the largest graft mostly wins (docs/results.md).
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from esper.platform.contracts import GraftAction, Probe
from esper.platform.errors import UserError
from esper.platform.telemetry import Telemetry
from esper.policies.budget_rules import decision, trainable_grafts, trial_cost


@dataclass(frozen=True)
class LagPolicy:
    """The rules above; keeps no state."""

    steps: int = 100  # optimizer steps that each copy trains for
    tail: float = 0.5  # fraction of them, at the end, over which the loss is averaged
    patience: float = 0.12  # fraction of the decisions between two trials
    cost: float = 0.05  # fraction of the budget that one trial may use: of 24 decisions little more than one
    tokens_per_parameter: float = 50.0  # over the rest of the budget, per non-embedding one after a graft; Tamiyo's

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """The best graft tried, or WAIT with the reason; a UserError without a probe."""
        if probe is None:
            what = "lag tries grafts on copies of the run, and was given no probe to try them through"
            raise UserError(f"{what}: play it where there is a run to copy, as under `esper train lag`.")
        wait = partial(GraftAction, 0, telemetry.sequence)
        if not telemetry.get("slopes_measured"):
            return wait("no slope yet")
        number, decisions = decision(telemetry)
        every = max(1, math.ceil(self.patience * decisions - 1e-9))
        if number % every:
            return wait(f"tries every {every} decisions")
        grafts = trainable_grafts(telemetry, self.tokens_per_parameter)
        if not grafts:
            return wait("no graft that the rest of the budget can train")
        rows = [0, *grafts]
        cost = trial_cost(telemetry, rows, self.steps)
        if cost > self.cost:
            return wait(f"trying {len(grafts)} grafts would cost {cost:.1%} of the budget > {self.cost:.1%}")
        if cost >= telemetry.get("growth_left"):
            return wait("the rate would decay before the trial ends")
        losses = probe.twins([GraftAction(row, telemetry.sequence, "tried") for row in rows], self.steps)
        means = losses[:, -max(1, round(self.tail * self.steps)) :].mean(axis=1)
        means[~np.isfinite(means)] = math.inf
        best = int(means.argmin())
        if best == 0:
            return wait(f"none of {len(grafts)} grafts tried is ahead after {self.steps} steps")
        return GraftAction(
            rows[best],
            telemetry.sequence,
            f"best of {len(grafts)} tried: {1e3 * (means[0] - means[best]):.2f} millinats ahead of waiting after "
            f"{self.steps} steps, for {cost:.1%} of the budget",
        )
