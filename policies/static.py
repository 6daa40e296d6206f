"""Static (alias `baseline`): never grows. The control for every other arm."""

from esper.platform.contracts import GraftAction, Probe
from esper.platform.telemetry import Telemetry


class StaticPolicy:
    """Always WAIT."""

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        return GraftAction(0, telemetry.sequence, "static")
