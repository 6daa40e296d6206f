"""Two clocks for one ledger: measured wall time, and a reference that the machine's load does not change.

Reference step: `base + layer·depth + expert·experts + FLOPs/rate`, times `split_factor` while segments are separate.
`esper calibrate` fits the constants on an idle device. The wall clock takes the formula only to predict a graft's cost.
"""

from typing import Annotated, Literal

from pydantic import Field

from esper.platform.contracts import HostShape, Seconds
from esper.platform.frozen import Frozen
from esper.platform.ledger import Axis


class ClockSpec(Frozen):
    """Which clock, and the fitted constants of the reference formula."""

    kind: Literal["reference", "wall"] = "reference"
    base_seconds: Seconds = 1e-3  # of a step that no layer accounts for
    layer_seconds: Seconds = 1e-3  # that a layer adds to a step, whatever its size
    flops_per_second: Annotated[float, Field(gt=0)] = 5e10  # rate at which a step's FLOPs are done
    split_factor: Annotated[float, Field(ge=1)] = 1.0  # on a step while some seed's segments are separate
    expert_seconds: Seconds = 1e-3  # that an expert adds to a step, whatever its size
    graft_seconds: Seconds = 1e-3  # of one graft, prune or rollback
    fuse_seconds: Seconds = 1e-3  # of fusing one seed
    measured_on: str = ""  # device, threads, dtype and command that the constants were fitted with

    def step_seconds(self, shape: HostShape, tokens: int, *, split: bool = False) -> float:
        """Predicted seconds of an optimizer step over `tokens` tokens."""
        flops = tokens * shape.flops_per_token()
        fixed = self.base_seconds + self.layer_seconds * shape.depth() + self.expert_seconds * shape.experts()
        plain = fixed + flops / self.flops_per_second
        return plain * (self.split_factor if split else 1.0)

    def axis_per_step(self, axis: Axis, shape: HostShape, tokens: int, *, split: bool = False) -> float:
        """Predicted use of a budget axis by an optimizer step over `tokens` tokens."""
        if axis == "steps":
            return 1.0
        if axis == "tokens":
            return float(tokens)
        if axis == "flops":
            return float(tokens * shape.flops_per_token())
        seconds = self.step_seconds(shape, tokens, split=split)
        return seconds if axis == "seconds" else seconds * shape.parameters_count()

    def reading(self, predicted: float, measured: float) -> float:
        """Seconds charged: `predicted` by the reference clock, else `measured`."""
        return predicted if self.kind == "reference" else measured
