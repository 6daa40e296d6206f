"""Clocks: what a step costs, by measured time or by a reference that load does not change, and how far a budget is.

Reference step: `base + layer·depth + expert·experts + FLOPs/rate`; the wall clock takes it to predict a graft's cost.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from esper.platform.contracts import HostShape, Seconds
from esper.platform.frozen import Frozen
from esper.platform.ledger import Axis


class ClockSpec(Frozen):
    """Which clock, and the fitted constants of the reference formula."""

    kind: Literal["reference", "wall"] = "reference"  # time by the formula, or measured
    base_seconds: Seconds = 1e-3  # of a step that no layer accounts for
    layer_seconds: Seconds = 1e-3  # that a layer adds to a step, whatever its size
    flops_per_second: Annotated[float, Field(gt=0)] = 5e10  # rate at which a step's FLOPs are done
    expert_seconds: Seconds = 1e-3  # that an expert adds to a step, whatever its size
    graft_seconds: Seconds = 1e-3  # of one graft, prune or rollback
    measured_on: str = ""  # device, threads, dtype and command that the constants were fitted with

    def step_seconds(self, shape: HostShape, tokens: int) -> float:
        """Predicted seconds of an optimizer step over `tokens` tokens."""
        fixed = self.base_seconds + self.layer_seconds * shape.depth() + self.expert_seconds * shape.experts()
        return fixed + tokens * shape.flops_per_token() / self.flops_per_second

    def axis_per_step(self, axis: Axis, shape: HostShape, tokens: int) -> float:
        """Predicted use of a budget axis by an optimizer step over `tokens` tokens."""
        seconds = self.step_seconds(shape, tokens)
        counts = {"steps": 1, "tokens": tokens, "flops": tokens * shape.flops_per_token(), "seconds": seconds}
        return float(counts[axis] if axis in counts else seconds * shape.parameters_count())

    def foretells(self, axis: Axis) -> bool:
        """Whether a step's use of a budget axis is known beforehand."""
        return self.kind == "reference" or axis in ("steps", "tokens", "flops")

    def reading(self, predicted: float, measured: float) -> float:
        """Seconds charged: `predicted` by the reference clock, else `measured`."""
        return predicted if self.kind == "reference" else measured


@dataclass
class DecisionClock:
    """A run's place in its budget, which K decisions of equal size share.

    Decision k ends at the first optimizer step with a reading ≥ k·B/K; the next one is shorter by the overshoot. A cost
    that crosses several boundaries moves `passed` by more than one.
    """

    amount: float  # the budget B, in its axis's unit
    decisions: int  # K
    passed: int = 0  # boundaries passed so far

    @property
    def slice(self) -> float:
        return self.amount / self.decisions

    @property
    def boundary(self) -> float:
        """The reading at which the current decision ends."""
        return (self.passed + 1) * self.slice

    @property
    def spent(self) -> bool:
        return self.passed >= self.decisions

    def ends(self, reading: float) -> bool:
        return self._passed(reading) >= self.decisions

    def advance(self, reading: float) -> None:
        """Note that training stopped at `reading`."""
        self.passed = max(self.passed, self._passed(reading))

    def _passed(self, reading: float) -> int:
        """Boundaries passed at `reading`; one that it is short of by rounding alone too."""
        return min(self.decisions, int(reading / self.slice * (1 + 1e-9)))
