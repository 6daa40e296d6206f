"""Distilling: a policy's median schedule, from the episodes it played: the open-loop control, which looks at nothing.

1. As many grafts of a blueprint as the median episode has.
2. The j-th of them is due at the median budget fraction of those episodes that have a j-th.
3. It names a site if most of those episodes took the same one, and one that every episode starts with; else the
   schedule takes the deepest site where the graft is legal.

Prunes have no place in a schedule and are left out.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

from esper.policies.schedule import Entry

DIGITS = 6  # of a budget fraction


@dataclass(frozen=True)
class Taken:
    """A graft of an episode."""

    fraction: float  # of the budget that was spent then
    blueprint: str
    site: str


def median_schedule(episodes: Sequence[Sequence[Taken]], decisions: int, sites: Collection[str] = ()) -> list[Entry]:
    """The schedule that stands for these episodes, by the fraction at which its entries are due.

    Args:
        episodes: the grafts of each, in order; at least one episode.
        decisions: in a budget. A decision falls on the first optimizer step past its boundary, and how far past varies:
            fractions are taken back to the boundary.
        sites: that every episode starts with.
    """
    entries = []
    for blueprint in sorted({graft.blueprint for grafts in episodes for graft in grafts}):
        of_kind = [[graft for graft in grafts if graft.blueprint == blueprint] for grafts in episodes]
        for j in range(math.floor(median(map(len, of_kind)) + 0.5)):
            nth = [grafts[j] for grafts in of_kind if len(grafts) > j]
            due = median(_boundary(graft.fraction, decisions) for graft in nth)
            site, votes = Counter(graft.site for graft in nth).most_common(1)[0]
            named = site if site in sites and 2 * votes > len(nth) else None
            entries.append(Entry(at=_floored(due), blueprint=blueprint, site=named))
    return sorted(entries, key=lambda entry: entry.at)


def _boundary(fraction: float, decisions: int) -> float:
    return math.floor(fraction * decisions + 1e-6) / decisions


def _floored(fraction: float) -> float:
    """Few digits, and never later: an entry rounded up would be due a decision late."""
    return math.floor(fraction * 10**DIGITS) / 10**DIGITS
