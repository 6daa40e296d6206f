"""Planner: plays the first action of the best plan by scaling laws that were fitted to other runs.

1. The run weighs an ensemble of laws by its own losses so far, and plans with it (`Probe.forecast`).
2. Take the graft of the lowest expected final loss, at its deepest site, if that is lower than waiting's; or else wait.
"""

from dataclasses import dataclass

from esper.platform.contracts import GraftAction, Probe
from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.telemetry import Telemetry


@dataclass(frozen=True)
class PlannerPolicy:
    """The rules above; keeps no state: all it knows of the run is in the run."""

    laws: FittedLaws

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """The first action of the best plan; a UserError without a probe."""
        if probe is None:
            what = "planner foretells the run it is in, and was given no probe of it"
            raise UserError(f"{what}: play it where there is one, as under `esper train planner`.")
        finals = probe.forecast(self.laws)
        waiting, best = finals[0], finals.min()
        if best >= waiting:
            return GraftAction(0, telemetry.sequence, f"waiting is expected to end at {waiting:.4f}")
        row, gain = int((finals == best).nonzero()[0][-1]), 1e3 * (waiting - best)
        why = f"expected to end at {best:.4f}, {gain:.2f} millinats below waiting"
        return GraftAction(row, telemetry.sequence, why)
