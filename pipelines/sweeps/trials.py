"""A sweep's trial: one arm on one seed at one grid point, a whole training run; and the specs that arms run under.

Purposes: "rates" and "tuning" run on tuning seeds, and choose each arm's learning rate and decay, then the best size
and schedule. "test" runs on test seeds, and is compared.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esper.pipelines.sweeps.arms import Arm
from esper.pipelines.sweeps.plan import Point
from esper.pipelines.sweeps.sizes import Size
from esper.platform.ledger import AXES
from esper.platform.spec import RunSpec
from esper.policies.arms import ArmInputs
from esper.workers.tolaria.rate import rate, stable_rate

Purpose = Literal["rates", "tuning", "test"]


@dataclass(frozen=True, eq=False)
class Trial:
    """One run."""

    arm: Arm
    purpose: Purpose
    seed: int
    point: Point
    spec: RunSpec
    inputs: ArmInputs = field(default_factory=ArmInputs)  # files that its policy needs
    note: str = ""  # tells it from others of the same label and seed
    impossible: str | None = None  # why it cannot be run, if it cannot

    @property
    def name(self) -> str:
        """Unique in the sweep; names its folder and its run."""
        parts = [self.arm.label.replace(":", ".of." if self.arm.of else "."), self.note, f"seed{self.seed}"]
        return "-".join(filter(None, [*parts, f"point{self.point.index}" if self.point.several else ""]))

    def tags(self) -> dict[str, Any]:
        whose = {"arm": self.arm.name, "label": self.arm.label, "size": self.spec.host.n_layer, "seed": self.seed}
        return {**whose, "purpose": self.purpose, "grid": self.point.grid}


def with_rates(spec: RunSpec, rates: Iterable[tuple[Size, float]]) -> RunSpec:
    """With the stable rates of static sizes, which any run has while it has as many parameters."""
    pairs = {size.parameters(spec): rate for size, rate in rates}
    return spec.overridden({"optimizer.rates": sorted(pairs.items())})


def lrpath_spec(spec: RunSpec, size: Size, curve: Iterable[dict[str, float]]) -> RunSpec:
    """A static size under the stable rate that a run had (its summary's `val_curve`), read at its decisions."""
    path = []
    for point in curve:
        fraction = point["budget_fraction"]
        share = rate(spec.optimizer, fraction, 1) / stable_rate(spec.optimizer, 1)  # that warm-up and decay leave
        if share > 0 and fraction >= spec.optimizer.warmup:
            path.append([fraction, point["learning_rate"] / share])
    return size.born(spec, rate_path=path)


def cost(spec: RunSpec, summary: Mapping[str, Any]) -> dict[str, float]:
    """What a run has used on each ledger axis, with its cooldown forks, which are not charged to the run."""
    used = {axis: summary[axis] for axis in AXES}
    for at, fork in zip(spec.budget.cooldowns, summary["annealed"], strict=False):
        begun = at * spec.optimizer.decay_from
        start = next(point for point in summary["val_curve"] if point["budget_fraction"] >= begun)
        used = {axis: used[axis] + fork[axis] - start[axis] for axis in AXES}
    return used
