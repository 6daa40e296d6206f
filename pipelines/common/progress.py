"""Live progress of one run: a line per decision, and between them one that is rewritten in a terminal."""

import sys
import time

from esper.platform.console import Eta, say
from esper.platform.contracts import GraftAction
from esper.platform.telemetry import Telemetry
from esper.workers.run import GrowthRun

REFRESH_SECONDS = 0.5
CLEAR = "\r\033[K"  # the terminal's line


class RunProgress:
    """`done` is the budget fraction of a resumed run."""

    def __init__(self, done: float = 0.0) -> None:
        self._eta, self._live, self._shown_at = Eta(done), sys.stderr.isatty(), time.perf_counter()

    def on_step(self, run: GrowthRun) -> None:
        """Rewrite the live line, at most twice a second."""
        if self._live and time.perf_counter() - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = time.perf_counter()
            print(CLEAR + self._line(run), end="", file=sys.stderr, flush=True)

    def on_decision(self, run: GrowthRun, telemetry: Telemetry, action: GraftAction) -> None:
        """Print what was decided and where the run stands now."""
        if self._live:
            print(CLEAR, end="", file=sys.stderr)
        chosen = telemetry.actions[action.index]
        if chosen.operation != "wait":
            say(f"  {chosen}: {action.reason}")
        for rollback in run.rollbacks:
            if rollback.decision == telemetry.sequence:
                removed = f", {rollback.removed} removed" if rollback.removed else ""
                say(f"  rolled back at step {rollback.optimizer_step:,}: {rollback.fault}{removed}")
        say(f"{self._line(run)}, val loss {run.loss:.4f}")

    def _line(self, run: GrowthRun) -> str:
        fraction, ledger = run.fraction(), run.ledger
        return (
            f"{fraction:4.0%} of budget, step {ledger.steps:,}, {run.layout.parameters:,} parameters, "
            f"{ledger.tokens / max(ledger.wall_seconds, 1e-9):,.0f} tokens/s, {self._eta.left(fraction)} left"
        )
