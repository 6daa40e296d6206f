"""When a sweep has test seeds enough (`--seeds auto:N`): once each arm's regret is known as closely as was asked for.

Its intervals are those of a confidence sequence, which hold whenever one stops (`common/statistics.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import numpy as np

from esper.pipelines.common.statistics import Interval


def widest(groups: Iterable[Sequence[Mapping[str, np.ndarray]]]) -> tuple[str, float]:
    """The arm whose mean regret over a group's budgets has the widest interval, and how wide that is, in nats.

    groups: of grid points that differ in their budget only, each with regrets (seeds,) by label, NaN where there is
    none. An arm that has none at all does not count.
    """
    found = [("", 0.0)]
    for points in groups:
        for label in points[0]:
            values = np.mean([point[label] for point in points], axis=0)
            if len(sound := values[np.isfinite(values)]):
                found.append((label, Interval.of(sound, sequential=True).width))
    return max(found, key=itemgetter(1))
