"""Intervals of a fixed number of pairs, and of one that grows while one looks. Alone: `pytest …/test_statistics.py`."""

import numpy as np
import pytest

from esper.pipelines.common.statistics import Interval, critical_t, detectable, p_below
from esper.pipelines.sweeps.plan import AT_ONCE

SWEEPS, MOST, SPREAD = 1000, 60, 0.013  # of differences between seeds, nats


def errors(width: float, shows: bool, sequential: bool) -> float:
    """The share of sweeps under the null whose interval excludes 0 where they stop.

    They stop as `--seeds auto` does; or where it excludes 0 (`shows`), as somebody may who adds seeds by hand.
    """
    rng, wrong = np.random.default_rng(11), 0
    for _ in range(SWEEPS):
        regrets = rng.normal(0, SPREAD, MOST)
        for seeds in range(AT_ONCE, MOST + 1, 1 if shows else AT_ONCE):
            found = Interval.of(regrets[:seeds], sequential)
            excluded = abs(found.mean) > (found.half or 0)
            if excluded if shows else found.width <= width:
                break
        wrong += excluded
    return wrong / SWEEPS


@pytest.mark.parametrize("shows", [False, True])
def test_seeds_that_are_added_on_the_way_keep_the_error_rate_with_the_sequence_and_not_with_t(shows):
    assert errors(0.02, shows, sequential=True) <= 0.05
    assert errors(0.02, shows, sequential=False) > (0.25 if shows else 0.055)


@pytest.mark.parametrize("n", [5, 12, 40])
def test_the_sequences_interval_p_value_and_martingale_agree(n):
    """At an interval's end p is 5 %; 1/p is the martingale, whose mean is 1 under the null."""
    values = np.random.default_rng(n).normal(0, 1, n)
    found = Interval.of(values, sequential=True)
    assert p_below(values - found.mean - (found.half or 0), sequential=True) == pytest.approx(0.05)
    assert 1.4 < critical_t(n, sequential=True) / critical_t(n) < 3.1
    assert (detectable(values, sequential=True) or 0) > (detectable(values) or 0)
    assert Interval.of(values[:4], sequential=True).half is None
    drawn = np.random.default_rng(1).normal(0, 1, (20_000, 6))
    t = drawn.mean(1) / drawn.std(1, ddof=1) * np.sqrt(6)
    share = 1 / 7
    martingale = np.sqrt(share) * ((1 + t**2 / 5) / (1 + share * t**2 / 5)) ** 3
    assert martingale.mean() == pytest.approx(1, abs=0.05)
    inverse = [1 / p_below(row, sequential=True) for row in drawn[:50]]
    assert inverse == pytest.approx(np.where(t < 0, np.maximum(1, martingale), 1)[:50])
