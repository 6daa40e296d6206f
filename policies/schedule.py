"""Schedule: a fixed list of grafts at budget fractions, blind to telemetry; given, named, or distilled of a policy's.

JSON: `[{"at": 0.15, "blueprint": "block"}, {"at": 0.4, "blueprint": "ffn", "site": "h0.ffn"}]`; without a site, the
deepest legal one. One graft a decision, in order, at or past its fraction; an illegal one waits until it is legal.

Named ones are to be beaten, and end before the rate falls on `tinystories-char`. Depth: Du et al. 2024 (2405.15319),
2511.04981; several kinds in turn: MSG (Yao et al. 2023, 2305.02869).
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field

from esper.platform.contracts import GraftAction, Probe
from esper.platform.errors import UserError, unknown
from esper.platform.frozen import Frozen
from esper.platform.storage import read_json
from esper.platform.telemetry import Telemetry

LAYER, HEADS, WIDTH = "layer", "heads", "width"  # of `telemetry.GROWTH_KINDS`
BLUEPRINTS = {  # kind of host → kind of growth → blueprint
    "transformer": {LAYER: "block", HEADS: "attention", WIDTH: "ffn"},
    "resnet": {LAYER: "conv_block", HEADS: "channel_attention", WIDTH: "conv_width"},
}
THRICE = (0.04, 0.2, 0.29)

NAMED: dict[str, tuple[tuple[float, str], ...]] = {  # (budget fraction, kind of growth)
    "onejump": ((0.15, LAYER),),
    "gradual": ((0.08, LAYER), (0.3, LAYER)),
    "periodic": tuple(zip((0.05, 0.11, 0.17, 0.23, 0.29, 0.35), (WIDTH, HEADS, LAYER) * 2, strict=True)),
    "heads": tuple((at, HEADS) for at in THRICE),
    "width": tuple((at, WIDTH) for at in THRICE),
    "twice": ((0.12, WIDTH), (0.29, WIDTH)),
    "mixed": ((0.04, WIDTH), (0.12, WIDTH), (0.25, LAYER)),
    "layers": tuple((at, LAYER) for at in THRICE),
}
DIGITS = 6  # of a budget fraction


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
            form = '[{"at": 0.15, "blueprint": "block"}], at being a budget fraction'
            raise UserError(f"--schedule {path} holds no list: write it as {form}.")
        return cls([Entry.checked(value, f"entry {i} of {path}") for i, value in enumerate(values)])

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """The due entry, or WAIT; a UserError where the run lacks its blueprint or site."""
        if telemetry.sequence == 0:
            self._next = 0
        if self._next == len(self.entries) or telemetry.get("budget_used") < self.entries[self._next].at - 1e-6:
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


def named_schedule(name: str, host: str) -> list[Entry]:
    """One of `NAMED` for a kind of host."""
    return [Entry(at=at, blueprint=BLUEPRINTS[host][kind]) for at, kind in NAMED[name]]


def median_schedule(summaries: Iterable[Mapping[str, Any]], decisions: int, sites: Collection[str] = ()) -> list[Entry]:
    """The median schedule of runs, at least one, by their summaries; `sites`: those that every run starts with.

    1. Of each blueprint as many grafts as the median run has, the j-th due at the median budget fraction of j-ths.
    2. A graft names a site if most of those runs took it and every run starts with it. Prunes are left out.
    Fractions are floored to the boundaries of `decisions`, those of a budget: a step seldom ends right at one.
    """
    episodes, entries = [summary["grafts"] for summary in summaries], []
    for blueprint in sorted({graft["blueprint"] for grafts in episodes for graft in grafts}):
        of_kind = [[graft for graft in grafts if graft["blueprint"] == blueprint] for grafts in episodes]
        for j in range(math.floor(median(map(len, of_kind)) + 0.5)):
            nth = [grafts[j] for grafts in of_kind if len(grafts) > j]
            due = median(math.floor(graft["budget_fraction"] * decisions + 1e-6) / decisions for graft in nth)
            floored = math.floor(due * 10**DIGITS) / 10**DIGITS  # rounded up, it would be due a decision late
            site, votes = Counter(graft["site"] for graft in nth).most_common(1)[0]
            named = site if site in sites and 2 * votes > len(nth) else None
            entries.append(Entry(at=floored, blueprint=blueprint, site=named))
    return sorted(entries, key=lambda entry: entry.at)


def as_json(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """A schedule as `SchedulePolicy.load` reads it."""
    return [entry.model_dump(mode="json", exclude_none=True) for entry in entries]
