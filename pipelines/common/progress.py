"""Live progress of one run: a line per decision, and between them one that is rewritten in a terminal."""

import sys
import time

from esper.platform.console import Eta, say
from esper.platform.contracts import GraftAction, Transition
from esper.platform.telemetry import Telemetry
from esper.workers.run import GrowthRun

REFRESH_SECONDS = 0.5


class RunProgress:
    """Give `on_step` to a GrowthRun and `on_decision` to `play`; `done` is the budget fraction of a resumed run."""

    def __init__(self, done: float = 0.0) -> None:
        self._eta = Eta(done)
        self._live = sys.stderr.isatty()
        self._shown_at = time.perf_counter()
        self._steps_then: int | None = None

    def on_step(self, run: GrowthRun) -> None:
        """Rewrite the live line, at most twice a second."""
        now = time.perf_counter()
        if not self._live or now - self._shown_at < REFRESH_SECONDS:
            return
        steps = 0 if self._steps_then is None else run.ledger.steps - self._steps_then
        rate = steps * run.tokens_per_step / (now - self._shown_at)
        self._shown_at, self._steps_then = now, run.ledger.steps
        if steps:
            sys.stderr.write(f"\r\033[K{self._line(run, rate)}")
            sys.stderr.flush()

    def on_decision(self, run: GrowthRun, telemetry: Telemetry, action: GraftAction, transition: Transition) -> None:
        """Print what was decided and where the run stands now."""
        if self._live:
            sys.stderr.write("\r\033[K")
        chosen = telemetry.actions[action.index]
        if chosen.operation != "wait":
            say(f"  {chosen}: {action.reason}")
        for rollback in run.rollbacks:
            if rollback.decision == telemetry.sequence:
                removed = f", {rollback.removed} removed" if rollback.removed else ""
                say(f"  rolled back at step {rollback.optimizer_step:,}: {rollback.fault}{removed}")
        rate = run.ledger.tokens / max(run.ledger.wall_seconds, 1e-9)
        say(f"{self._line(run, rate)}, val loss {run.loss:.4f}")

    def _line(self, run: GrowthRun, tokens_per_second: float) -> str:
        fraction = run.fraction()
        return (
            f"{fraction:4.0%} of budget, step {run.ledger.steps:,}, {run.layout.parameters:,} parameters, "
            f"{tokens_per_second:,.0f} tokens/s, {self._eta.left(fraction)} left"
        )
