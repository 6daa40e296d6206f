"""The search for the learning rate of each static size, on tuning seeds: an untuned baseline flatters its rival.

Each size tries rates a factor apart around the preset's, and extends an end that is best, until the best lies between
two others or `ROUNDS` are done.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

FACTOR = 1.5
ROUNDS = 6
DIGITS = 3  # of a rate: it is the same number wherever it is written

Tried = Mapping[float, Sequence[float]]  # rate → the final loss on each tuning seed, infinite where a run failed


def next_rates(start: float, tried: Tried) -> list[float]:
    """The rates to try next, from `start` on; none once the best lies between two others."""
    if not tried:
        rates = [start / FACTOR, start, start * FACTOR]
    elif best_rate(tried) == min(tried):
        rates = [min(tried) / FACTOR]
    elif best_rate(tried) == max(tried):
        rates = [max(tried) * FACTOR]
    else:
        rates = []
    return [float(f"{rate:.{DIGITS}g}") for rate in rates]


def best_rate(tried: Tried) -> float:
    """The rate with the lowest mean loss; of equal ones the lowest."""
    return min(sorted(tried), key=lambda rate: fmean(tried[rate]))


def bracketed(tried: Tried) -> bool:
    """Whether the best rate lies between two others."""
    return bool(tried) and min(tried) < best_rate(tried) < max(tried)
