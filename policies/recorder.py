"""Recorder: another policy, whose observations and choices are kept for `esper record`."""

import base64
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from esper.platform.contracts import GraftAction, GrowthPolicy, Planned, Probe, Stateful
from esper.platform.recording import SEEN, packed, seen_row
from esper.platform.telemetry import Telemetry
from esper.policies.own import blamed


class Recorder:
    """Decides as `policy` does. What it saw is part of its state: a resumed run has all of its decisions."""

    def __init__(self, policy: GrowthPolicy) -> None:
        self.policy = policy
        self._rows: list[dict[str, Any]] = []

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        with blamed(self.policy):
            action = self.policy.act(telemetry, probe)
        self._rows = [*self._rows[: telemetry.sequence], seen_row(telemetry, action.index)]
        return action

    def record(self, last: Telemetry | None = None) -> bytes:
        """The file of what was seen so far, and of the observation at the end."""
        rows = self._rows if last is None else [*self._rows, seen_row(last, None)]
        return packed(pa.Table.from_pylist(rows, schema=SEEN))

    def state(self) -> dict[str, Any]:
        own = self.policy.state() if isinstance(self.policy, Stateful) else None
        return {"policy": own, "seen": base64.b64encode(self.record()).decode()}

    def resume(self, state: dict[str, Any]) -> None:
        if isinstance(self.policy, Stateful):
            self.policy.resume(state["policy"])
        self._rows = pq.read_table(io.BytesIO(base64.b64decode(state["seen"]))).to_pylist()

    def unplayed(self) -> list[str]:
        return self.policy.unplayed() if isinstance(self.policy, Planned) else []
