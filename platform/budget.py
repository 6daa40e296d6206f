"""The decision clock: a budget on one axis, cut into K decisions of equal size."""

from dataclasses import dataclass


@dataclass
class DecisionClock:
    """A run's place in its budget.

    Decision k ends at the first optimizer step with a reading ≥ k·B/K; the next one is shorter by the overshoot. A cost
    that crosses several boundaries moves `passed` by more than one.
    """

    amount: float  # the budget B, in its axis's unit
    decisions: int  # K
    passed: int = 0  # boundaries passed so far

    @property
    def slice(self) -> float:
        """B/K."""
        return self.amount / self.decisions

    @property
    def boundary(self) -> float:
        """The reading at which the current decision ends."""
        return (self.passed + 1) * self.slice

    def advance(self, reading: float) -> None:
        """Note that training stopped at `reading`."""
        # The tolerance: a reading short of a boundary by rounding alone has passed it.
        self.passed = max(self.passed, min(self.decisions, int(reading / self.slice * (1 + 1e-9))))

    def fraction(self, reading: float) -> float:
        """Fraction of the budget spent, at most 1."""
        return min(1.0, reading / self.amount)

    @property
    def spent(self) -> bool:
        """Whether the last boundary has been passed."""
        return self.passed >= self.decisions
