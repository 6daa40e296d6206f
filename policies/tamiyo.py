"""Tamiyo (alias `heuristic`): the rule-based controller.

1. Wait while slope_fast × (budget left before the rate decays) > `flat`.
2. Wait until `patience` of all decisions have passed since the last graft: a young seed has shown nothing yet.
3. Keep the legal grafts after which the rest of the budget holds `tokens_per_parameter`; without any, wait.
4. Prefer a layer to neurons to heads, then the site of the greatest gradient over weight norm, less seconds per step.
"""

from dataclasses import dataclass
from functools import partial

from esper.platform.contracts import GraftAction, Probe
from esper.platform.telemetry import Telemetry
from esper.policies.budget_rules import trainable_grafts

PREFERENCE = ("layer", "width", "heads")


@dataclass(frozen=True)
class TamiyoPolicy:
    """The rules above; keeps no state."""

    flat: float = 0.3  # relative loss drop still to be had at the current slope, below which the loss counts as flat
    patience: float = 0.12  # fraction of the decisions to wait after a graft
    tokens_per_parameter: float = 50.0  # over the rest of the budget, per non-embedding one after the graft

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """One legal graft, or WAIT with the reason."""
        wait = partial(GraftAction, 0, telemetry.sequence)
        if not telemetry.get("slopes_measured"):
            return wait("no slope yet")
        still = telemetry.get("slope_fast") * telemetry.get("growth_left")
        if still > self.flat:
            return wait(f"still falling: {still:.2f} to be had > {self.flat}")
        if telemetry.get("since_graft") < self.patience:
            return wait("the last graft is young")
        kept = trainable_grafts(telemetry, self.tokens_per_parameter)
        for kind in PREFERENCE:
            of_kind = [i for i in kept if telemetry.candidate_column(f"adds_{kind}")[i]]
            if of_kind:
                score = telemetry.candidate_column("site_gradient_norm") * 10 - telemetry.candidate_column("seconds")
                best = max(of_kind, key=lambda i: (score[i], i))
                return GraftAction(best, telemetry.sequence, f"flat ({still:.2f}); pressure {score[best]:.2f}")
        return wait("no graft that the rest of the budget can train")
