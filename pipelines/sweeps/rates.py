"""The search for an arm's learning rate and the start of its decay, on tuning seeds: who is not tuned flatters a rival.

By coordinates: first where the decay starts, then the rate, a factor apart, extended at an end that is best until the
best lies between two others or `ROUNDS` are done. A growing arm's rate is a factor on the rates of the static sizes.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

DECAYS = (0.2, 0.4, 0.6, 0.8)  # fractions of the budget
FACTOR = 1.5
ROUNDS = 7
DIGITS = 3  # of a rate: it is the same number wherever it is written


class Setting(NamedTuple):
    """Of the optimizer."""

    rate: float
    decay_from: float

    def __str__(self) -> str:
        return f"{self.rate:g} until {self.decay_from:.0%}"


Tried = Mapping[Setting, Sequence[float]]  # the final loss on each tuning seed, infinite where a run failed


def next_settings(start: float, decays: Sequence[float], tried: Tried) -> list[Setting]:
    """What to try next, from the rate `start` on; nothing once the best rate lies between two others."""
    if not tried:
        return [_rounded(start, decay) for decay in decays]
    rate, decay = best_setting(tried)
    rates = _rates(tried)
    new = [rates[0] / FACTOR] * (rate == rates[0]) + [rates[-1] * FACTOR] * (rate == rates[-1])
    return [_rounded(rate, decay) for rate in new]


def best_setting(tried: Tried) -> Setting:
    """That with the lowest mean loss; of equal ones the first in order."""
    return min(sorted(tried), key=lambda setting: fmean(tried[setting]))


def bracketed(tried: Tried) -> bool:
    """Whether the best rate lies between two others."""
    return bool(tried) and best_setting(tried).rate not in (_rates(tried)[0], _rates(tried)[-1])


def _rates(tried: Tried) -> list[float]:
    return sorted(setting.rate for setting in tried if setting.decay_from == best_setting(tried).decay_from)


def _rounded(rate: float, decay: float) -> Setting:
    return Setting(float(f"{rate:.{DIGITS}g}"), decay)
