"""The learning rate of each static size, on tuning seeds, and the curve through them that growing arms follow.

An opponent whose rate was not tuned flatters whoever beats it, and deeper wants lower. So each size tries rates a
factor apart around the preset's, and goes on beyond an end that is the best, until the best lies between two others or
`ROUNDS` have been done.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

FACTOR = 1.5
ROUNDS = 6
DIGITS = 3  # of a rate


@dataclass(frozen=True)
class Curve:
    """A stable rate by size, `learning_rate · (N / rate_parameters)^(−rate_exponent)` (`OptimizerSpec`).

    No static size had more than `rate_max`, so nobody else gets more.
    """

    learning_rate: float
    rate_exponent: float
    rate_parameters: int
    rate_max: float

    def as_values(self) -> dict[str, float]:
        """As dotted keys of a spec."""
        return {f"optimizer.{name}": value for name, value in vars(self).items()}


def next_rates(start: float, losses: Mapping[float, Sequence[float]]) -> list[float]:
    """The rates to try next for a size; none once the best lies between two others.

    Args:
        start: rate to begin with.
        losses: by rate tried so far, the final loss on each tuning seed, infinite where a run failed.
    """
    if not losses:
        return [_rounded(start * FACTOR**power) for power in (-1, 0, 1)]
    tried = sorted(losses)
    best = best_rate(losses)
    if best == tried[0]:
        return [_rounded(best / FACTOR)]
    if best == tried[-1]:
        return [_rounded(best * FACTOR)]
    return []


def bracketed(losses: Mapping[float, Sequence[float]]) -> bool:
    """Whether the best rate lies between two others that were tried."""
    return bool(losses) and min(losses) < best_rate(losses) < max(losses)


def best_rate(losses: Mapping[float, Sequence[float]]) -> float:
    """The rate with the lowest mean loss; of equal ones the lowest."""
    return min(sorted(losses), key=lambda rate: fmean(losses[rate]))


def fitted_curve(rates: Mapping[int, float]) -> Curve:
    """The power law through the sizes' best rates: a line through their logarithms, by least squares.

    Args:
        rates: best rate by non-embedding parameters; through a single one goes a constant.
    """
    sizes, values = np.log(list(rates)), np.log(list(rates.values()))
    middle = float(sizes.mean())
    # An exponent below 0 would be a rate that rises with size: noise, and no spec takes it.
    slope = float(((sizes - middle) * values).sum() / ((sizes - middle) ** 2).sum()) if len(rates) > 1 else 0.0
    exponent = min(2.0, max(0.0, -slope))
    rate = _rounded(math.exp(values.mean()))
    return Curve(rate, _rounded(exponent), round(math.exp(middle)), max(rate, *rates.values()))


def _rounded(value: float) -> float:
    """To a few digits, so that a rate is the same number wherever it is written."""
    return float(f"{value:.{DIGITS}g}")
