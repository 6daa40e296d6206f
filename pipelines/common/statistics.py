"""The mean of paired differences with its t interval: what evaluations, reports and distillation tell."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import stdtrit  # the t distribution's quantiles; scipy.stats takes a second to import

CONFIDENCE = 0.95


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
