"""Schedule: a fixed list of grafts at budget fractions, blind to telemetry.

JSON: `[{"at": 0.15, "blueprint": "block"}, {"at": 0.4, "blueprint": "ffn", "site": "h0.ffn"}]`; without a site, the
deepest legal one. One graft a decision, in order, at or past its fraction; an illegal one waits until it is legal.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from esper.platform.contracts import GraftAction, Probe
from esper.platform.errors import UserError, unknown
from esper.platform.frozen import Frozen
from esper.platform.storage import read_json
from esper.platform.telemetry import Telemetry


class Entry(Frozen):
    """One graft of a schedule."""

    at: float = Field(ge=0, le=1, description="budget fraction at which it is due")
    blueprint: str
    site: str | None = None


class SchedulePolicy:
    """Plays `entries`, sorted by their fractions."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry.at)
        self._next = 0

    @classmethod
    def load(cls, path: Path) -> "SchedulePolicy":
        values = read_json(path, f"--schedule {path}", "a JSON file")
        if not isinstance(values, list):
            raise UserError(
                f"--schedule {path} holds no list: write it as "
                '[{"at": 0.15, "blueprint": "block"}], at being a budget fraction.'
            )
        return cls([Entry.checked(value, f"entry {i} of {path}") for i, value in enumerate(values)])

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """The due entry, or WAIT; a UserError where the run lacks its blueprint or site."""
        if telemetry.sequence == 0:
            self._next = 0
        if self._next == len(self.entries) or telemetry.get("budget_used") < self.entries[self._next].at:
            return GraftAction(0, telemetry.sequence, "nothing due")
        entry = self.entries[self._next]
        rows = self._rows(telemetry, entry)
        legal = [i for i in rows if telemetry.mask[i]]
        if not legal:
            return GraftAction(0, telemetry.sequence, f"{entry.blueprint} is due but not legal now")
        self._next += 1
        return GraftAction(legal[-1], telemetry.sequence, f"due at {entry.at:g}")

    def state(self) -> int:
        return self._next

    def resume(self, state: int) -> None:
        self._next = state

    def unplayed(self) -> list[str]:
        return [f"{entry.blueprint} at {entry.at:.0%}" for entry in self.entries[self._next :]]

    @staticmethod
    def _rows(telemetry: Telemetry, entry: Entry) -> list[int]:
        """The rows of an entry's graft, at any site where it names none."""
        grafts = [(i, action) for i, action in enumerate(telemetry.actions) if action.operation == "graft"]
        sites = {action.site: i for i, action in grafts if action.blueprint == entry.blueprint}
        if not sites:
            raise unknown("blueprint in the schedule", entry.blueprint, {str(each.blueprint) for _, each in grafts})
        if entry.site not in (None, *sites):
            raise unknown(f"site for {entry.blueprint} in the schedule", entry.site, map(str, sites))
        return list(sites.values()) if entry.site is None else [sites[entry.site]]
