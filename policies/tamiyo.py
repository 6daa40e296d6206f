"""Tamiyo (alias `heuristic`): the rule-based controller. It grows when training on earns less than growing would.

By a scaling law L = E(N) + B·D^(−β), a host of loss L gains in proportion to (L − E(N))^(1 + 1/β) / c nats per unit of
the budget, c being what a step costs, and grafts keep L. With β near 1, and E falling by g nats per e-fold of
parameters, a graft raises that rate, roughly, where

    ln(N'/N) / (√(c'/c) − 1)  >  (L − E(N)) / g  =  `worth` · √(part of the loss that 1,000 steps take off)

1. Wait while the loss still falls too fast for that, or less than `patience` of all decisions since the last graft.
2. Leave out grafts after which the rest of the budget does not hold `warm_ups` of a seed, and attention heads: on
   TinyStories their parameters are worth a third of others'.
3. Of the grafts left take the one with the greatest left side, the deepest of equal ones.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from esper.platform.contracts import GraftAction, Probe
from esper.platform.telemetry import Telemetry
from esper.policies.budget_rules import legal_grafts, slope_per_step, step_costs, steps_left


@dataclass(frozen=True)
class TamiyoPolicy:
    """The rules above; keeps no state. Tuned on laws of `tinystories-char` and on its tuning seeds."""

    worth: float = 2.2  # per √(part of the loss taken off by 1,000 steps): the larger, the later a graft
    patience: float = 0.08  # fraction of the decisions to wait after a graft: slopes then span the growth no more
    warm_ups: float = 2.75  # that a graft needs to pay
    warm_up: int = 400  # optimizer steps (`growth.probation_steps`)

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        wait = partial(GraftAction, 0, telemetry.sequence)
        if not telemetry.get("slopes_measured"):
            return wait("no slope yet")
        if telemetry.get("since_graft") < self.patience:
            return wait("the last graft is young")
        costs = step_costs(telemetry)
        kept, heads = legal_grafts(telemetry), telemetry.candidate_column("adds_heads")
        kept = [i for i in kept if steps_left(telemetry) / costs[i] >= self.warm_ups * self.warm_up and not heads[i]]
        if not kept:
            return wait("no graft that the rest of the budget can train")
        falls = 1000 * max(0.0, slope_per_step(telemetry))
        value = telemetry.candidate_column("parameters") / np.maximum(np.sqrt(costs) - 1, 1e-9)
        best = max(kept, key=lambda i: (value[i], i))
        said = f"{falls:.1%} of the loss in 1,000 steps, against {(value[best] / self.worth) ** 2:.1%}"
        if value[best] <= self.worth * np.sqrt(falls):
            return wait(f"still falling: {said}")
        return GraftAction(best, telemetry.sequence, f"flat: {said}")
