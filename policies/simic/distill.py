"""Distilling: the median schedule of a policy's episodes, an open-loop control. Prunes are left out.

1. Of each blueprint as many grafts as the median episode has, the j-th due at the median budget fraction of j-ths.
2. A graft names a site if most of those episodes took it and every episode starts with it; else the deepest legal one.
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
    """The schedule of at least one episode's grafts; `sites`: those that every episode starts with.

    Fractions are floored to the boundaries of `decisions`, those of a budget: a step seldom ends right at one.
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
    return math.floor(fraction * 10**DIGITS) / 10**DIGITS  # rounded up, it would be due a decision late
