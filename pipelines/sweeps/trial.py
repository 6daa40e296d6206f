"""A sweep's trial: one arm on one seed at one grid point, a whole training run; and the specs that arms run under.

    purpose   seeds    what for
    rates     tuning   finds the learning rate of each static size
    tuning    tuning   chooses the best static size and the best schedule; gives `openloop` its schedule
    test      test     is compared

Tuning seeds are never test seeds (`plan.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from esper.pipelines.sweeps.arm_names import FINAL, LRPATH, OPENLOOP
from esper.pipelines.sweeps.entrants import Entrant
from esper.pipelines.sweeps.grid import Point
from esper.platform.spec import RunSpec
from esper.policies.arms import ArmInputs
from esper.workers.tolaria.rate import rate, stable_rate

Purpose = Literal["rates", "tuning", "test"]

COOLDOWNS = (0.3, 0.6)  # budget fractions of the annealed losses that opponents need on other axes than the budget's


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        entrant: the arm.
        purpose: what for.
        seed: of the run.
        point: where.
        spec: everything that decides its numbers.
        inputs: files that its controller needs.
        note: tells it from others of the same label and seed.
        several: whether there are several points.
    """

    entrant: Entrant
    purpose: Purpose
    seed: int
    point: Point
    spec: RunSpec
    inputs: ArmInputs
    note: str = ""
    several: bool = False

    @property
    def name(self) -> str:
        """Its own among the sweep's: a folder's and a run's."""
        return trial_name(self.entrant, self.seed, self.point, self.note, several=self.several)

    @property
    def row(self) -> str:
        """Of a table of all grid points."""
        return f"{self.entrant.label} {self.point.grid}" if self.several else self.entrant.label

    @property
    def arm(self) -> str:
        """The controller that plays it."""
        arm = self.entrant.arm
        return {FINAL: "static", LRPATH: "static", OPENLOOP: "schedule"}.get(arm, arm)

    def tags(self) -> dict[str, Any]:
        """What MLflow's UI filters and groups by."""
        return {
            "kind": "trial",
            "arm": self.entrant.arm,
            "label": self.entrant.label,
            "size": self.spec.host.n_layer,
            "seed": self.seed,
            "purpose": self.purpose,
            "grid": self.point.grid,
            "preset": self.spec.preset,
        }


def trial_name(entrant: Entrant, seed: int, point: Point, note: str = "", *, several: bool) -> str:
    """A trial's own among its sweep's."""
    parts = [entrant.label.replace(":", ".of."), note, f"seed{seed}"]
    parts += [f"point{point.index}"] if several else []
    return "-".join(part for part in parts if part)


def static_spec(spec: RunSpec, size: int, constant: float | None = None) -> RunSpec:
    """With so many layers from the start, and a stable rate that is the same at every size, where one is given."""
    values: dict[str, Any] = {"host.n_layer": size, "host.layers": None}
    if constant is not None:
        values["optimizer.learning_rate"] = constant
        values["optimizer.rate_exponent"] = 0.0
        values["optimizer.rate_max"] = max(constant, spec.optimizer.rate_max)
    return _born(spec, values)


def final_spec(spec: RunSpec, shape: Sequence[dict[str, Any]]) -> RunSpec:
    """Born in a shape that a run ended with (its summary's `shape`)."""
    return _born(spec, {"host.n_layer": len(shape), "host.layers": list(shape)})


def lrpath_spec(spec: RunSpec, size: int, curve: Iterable[dict[str, float]]) -> RunSpec:
    """A static size under the stable rate that a run had (its summary's `val_curve`), read at its decisions."""
    path = []
    for point in curve:
        fraction = point["budget_fraction"]
        share = rate(spec.optimizer, fraction, 1) / stable_rate(spec.optimizer, 1)  # that warm-up and decay leave
        if share > 0 and fraction >= spec.optimizer.warmup:
            path.append([fraction, point["learning_rate"] / share])
    return _born(spec, {"host.n_layer": size, "host.layers": None, "optimizer.rate_path": path})


def with_cooldowns(spec: RunSpec) -> RunSpec:
    """With annealed losses on the way, unless the spec has its own."""
    return spec if spec.budget.cooldowns else spec.overridden({"budget.cooldowns": COOLDOWNS})


def _born(spec: RunSpec, values: dict[str, Any]) -> RunSpec:
    """A shape that is started with may be larger than growing may get."""
    layers = max(values["host.n_layer"], spec.growth.max_layers)
    return spec.overridden({**values, "growth.max_layers": layers})
