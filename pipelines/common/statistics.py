"""The mean of paired differences with its t interval: what evaluations, reports and distillation tell."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import nctdtrinc, stdtrit  # of the t distributions; scipy.stats takes a second to import

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its 95 % t interval (None for fewer than two values)."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """From values (n,), such as differences of pairs."""
        n = len(values)
        if n < 2:
            return cls(float(values.mean()), None)
        error = values.std(ddof=1) / np.sqrt(n)
        return cls(float(values.mean()), float(error * stdtrit(n - 1, (1 + CONFIDENCE) / 2)))

    def as_dict(self) -> dict[str, float | None]:
        """As JSON values."""
        return {"mean": self.mean, "half_width_95": self.half}

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def detectable(differences: np.ndarray) -> float | None:
    """The true mean whose 95 % t interval excludes 0 on its own side in 80 % of such samples; None for fewer than two.

    From the spread of paired differences (n,) and the noncentral t distribution (Cohen 1988, chapter 2).
    """
    n = len(differences)
    if n < 2:
        return None
    noncentral = nctdtrinc(n - 1, 1 - POWER, stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return float(noncentral * differences.std(ddof=1) / np.sqrt(n))
