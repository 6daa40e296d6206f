"""Distilling: the median schedule of a policy's episodes, an open-loop control. Prunes are left out.

1. Of each blueprint as many grafts as the median episode has, the j-th due at the median budget fraction of j-ths.
2. A graft names a site if most of those episodes took it and every episode starts with it; else the deepest legal one.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any

from esper.policies.schedule import Entry

DIGITS = 6  # of a budget fraction


def median_schedule(summaries: Iterable[Mapping[str, Any]], decisions: int, sites: Collection[str] = ()) -> list[Entry]:
    """The schedule of runs, at least one, by their summaries; `sites`: those that every run starts with.

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
