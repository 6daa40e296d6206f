"""Two clocks for one ledger: measured wall time, and a deterministic reference.

The reference clock's seconds per optimizer step are `base + layer·depth + expert·experts + FLOPs/rate`, times a factor
while a seed's segments are still separate tensors, plus constants for a graft and for fusing. The constants are fitted
once on an idle device (`esper calibrate` fits them and prints their error against wall time) and stored with the run,
so that a result does not depend on what else the machine was doing. The wall clock uses the same formula only to
predict what a graft would cost.
"""

from typing import Annotated, Literal

from pydantic import Field

from esper.platform.contracts import HostShape, Seconds
from esper.platform.frozen import Frozen
from esper.platform.ledger import Axis


class ClockSpec(Frozen):
    """Which clock a run is measured by, and the fitted constants of the reference formula."""

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
        """Predicted seconds of one optimizer step over `tokens` tokens at this shape."""
        flops = tokens * shape.flops_per_token()
        fixed = self.base_seconds + self.layer_seconds * shape.depth() + self.expert_seconds * shape.experts()
        plain = fixed + flops / self.flops_per_second
        return plain * (self.split_factor if split else 1.0)

    def axis_per_step(self, axis: Axis, shape: HostShape, tokens: int, *, split: bool = False) -> float:
        """Predicted use of one budget axis by one optimizer step over `tokens` tokens at this shape."""
        if axis == "steps":
            return 1.0
        if axis == "tokens":
            return float(tokens)
        if axis == "flops":
            return float(tokens * shape.flops_per_token())
        seconds = self.step_seconds(shape, tokens, split=split)
        return seconds if axis == "seconds" else seconds * shape.parameters_count()

    def reading(self, predicted: float, measured: float) -> float:
        """The seconds this clock charges for something predicted and measured (both in seconds)."""
        return predicted if self.kind == "reference" else measured
