"""The mean of paired differences with its interval: what evaluations, reports and distillation tell.

For a number of pairs n that was fixed before: Student's t. Where pairs were added while one looked (`sequential`): the
t-test confidence sequence, whose intervals hold the mean at all n at once in 95 % of samples, whenever one stops and
for whatever reason (Wang & Ramdas 2023, 2310.03722, theorem 4.9: Lai's of 1976 with a Gaussian mixture over mean / sd).
With ν = n − 1 and ρ = c² / (n + c²), the martingale under a mean of 0 is √ρ · ((1 + t²/ν) / (1 + ρ t²/ν))^(n/2); by
Ville's inequality it ever passes 1 / α with a probability of at most α.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit  # of the t distributions; scipy.stats takes a second to import

CONFIDENCE = 0.95
POWER = 0.8
MIXTURE = 1.0  # c², the precision of the mixture: intervals are finite from 5 pairs on, near their best from 8 to 80


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its 95 % interval (None where there are too few values for one)."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: np.ndarray, sequential: bool = False) -> Self:
        critical = critical_t(len(values), sequential)
        return cls(float(values.mean()), float(critical * _error(values)) if np.isfinite(critical) else None)

    @property
    def width(self) -> float:
        return np.inf if self.half is None else 2 * self.half

    def as_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "half_width_95": self.half}

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def critical_t(n: int, sequential: bool = False) -> float:
    """The |t| from which n values exclude a mean of 0 with a confidence of 95 %; infinite where none does."""
    if n < 2:
        return np.inf
    if not sequential:
        return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    share = MIXTURE / (n + MIXTURE)
    ratio = (share**-0.5 / (1 - CONFIDENCE)) ** (2 / n)  # that (1 + t²/ν) / (1 + ρ t²/ν) has to reach; it is below 1/ρ
    return float(np.sqrt((n - 1) * (ratio - 1) / (1 - ratio * share))) if ratio * share < 1 else np.inf


def p_below(values: np.ndarray, sequential: bool = False) -> float:
    """Twice the p-value of values (n,) against a mean of at least 0; 1 where no test can be made."""
    n, mean = len(values), values.mean() if len(values) else 0.0
    if n < 2 or mean >= 0:
        return 1.0
    error = _error(values)
    squared = (mean / error) ** 2 / (n - 1) if error else np.inf
    if not sequential:
        return float(2 * stdtr(n - 1, -np.sqrt(squared * (n - 1))))
    share = MIXTURE / (n + MIXTURE)
    ratio = (1 + squared) / (1 + share * squared) if error else 1 / share
    return float(min(1.0, share**-0.5 * ratio ** (-n / 2)))


def detectable(values: np.ndarray, sequential: bool = False) -> float | None:
    """The true mean whose 95 % interval excludes 0 on its own side in 80 % of such samples; None for too few values.

    From the spread of paired differences (n,) and the noncentral t distribution (Cohen 1988, chapter 2).
    """
    critical = critical_t(len(values), sequential)
    return float(nctdtrinc(len(values) - 1, 1 - POWER, critical) * _error(values)) if np.isfinite(critical) else None


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
