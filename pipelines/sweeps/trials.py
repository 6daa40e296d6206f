"""A sweep's trial: one arm on one seed at one grid point, a whole training run; and the specs that arms run under.

Purposes: "rates" and "tuning" run on tuning seeds, and choose the static sizes' learning rates, then the best size and
schedule. "test" runs on test seeds, and is compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from esper.pipelines.sweeps.arms import Arm
from esper.pipelines.sweeps.plan import Point
from esper.platform.ledger import AXES
from esper.platform.spec import RunSpec
from esper.policies.arms import ArmInputs
from esper.workers.tolaria.hosts import start_shape
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
        parts = [self.arm.label.replace(":", ".of."), self.note, f"seed{self.seed}"]
        return "-".join(filter(None, [*parts, f"point{self.point.index}" if self.point.several else ""]))

    def tags(self) -> dict[str, Any]:
        """What MLflow's UI filters and groups by."""
        whose = {"arm": self.arm.name, "label": self.arm.label, "size": self.spec.host.n_layer, "seed": self.seed}
        return {**whose, "purpose": self.purpose, "grid": self.point.grid}


def born(spec: RunSpec, size: int, shape: Sequence[dict[str, Any]] | None = None, **optimizer: Any) -> RunSpec:
    """With so many layers from the start, all alike or in a shape that a run ended with (its summary's `shape`)."""
    values = {"host.n_layer": size, "host.layers": shape, "growth.max_layers": max(size, spec.growth.max_layers)}
    return spec.overridden({**values, **{f"optimizer.{key}": value for key, value in optimizer.items()}})


def size_parameters(spec: RunSpec, size: int) -> int:
    """Non-embedding parameters of a static size."""
    return start_shape(born(spec, size), vocab_size=1).parameters_count(non_embedding=True)


def with_rates(spec: RunSpec, rates: Mapping[int, float] | None) -> RunSpec:
    """With the stable rates of static sizes (layers → rate), which any run has while it has that size."""
    pairs = sorted((size_parameters(spec, size), rate) for size, rate in (rates or {}).items())
    return spec.overridden({"optimizer.rates": pairs}) if pairs else spec


def lrpath_spec(spec: RunSpec, size: int, curve: Iterable[dict[str, float]]) -> RunSpec:
    """A static size under the stable rate that a run had (its summary's `val_curve`), read at its decisions."""
    path = []
    for point in curve:
        fraction = point["budget_fraction"]
        share = rate(spec.optimizer, fraction, 1) / stable_rate(spec.optimizer, 1)  # that warm-up and decay leave
        if share > 0 and fraction >= spec.optimizer.warmup:
            path.append([fraction, point["learning_rate"] / share])
    return born(spec, size, rate_path=path)


def cost(spec: RunSpec, summary: Mapping[str, Any]) -> dict[str, float]:
    """What a run has used on each ledger axis, with its cooldown forks, which are not charged to the run."""
    used = {axis: summary[axis] for axis in AXES}
    for at, fork in zip(spec.budget.cooldowns, summary["annealed"], strict=False):
        begun = at * spec.optimizer.decay_from
        start = next(point for point in summary["val_curve"] if point["budget_fraction"] >= begun)
        used = {axis: used[axis] + fork[axis] - start[axis] for axis in AXES}
    return used
