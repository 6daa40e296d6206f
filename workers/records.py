"""An episode's records, and their saved form."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from esper.platform.contracts import Instance
from esper.platform.frozen import Frozen
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.workers.kasmina.registry import Natural

Finite = Annotated[float, Field(allow_inf_nan=False)]
Point = dict[str, Any]  # of the loss curve, in JSON values: budget fraction, ledger axes, parameters, validation loss


@dataclass
class Change:
    """A change of the host, as in `summary.json`."""

    budget_fraction: Finite
    decision: Natural  # number of the observation that it answered
    optimizer_step: Natural
    site: str
    blueprint: str
    parameters_before: Natural
    parameters_after: Natural
    val_loss_before: Finite
    reason: str
    val_loss_after: Finite | None = None  # nats per token; None until it is evaluated, and where it was not finite


@dataclass
class Graft(Change):
    """A graft; it has an outcome once the run has ended."""

    outcome: Literal["kept", "pruned", "rolled back", "on probation"] | None = None


@dataclass
class Rollback:
    """A fault that was undone, and the graft removed for it."""

    budget_fraction: Finite
    decision: Natural
    optimizer_step: Natural
    fault: str
    removed: str | None


class EpisodeState(Frozen):
    """An episode without its trainer; fields are `Episode`'s attributes of the same names."""

    spec: RunSpec
    instance: Instance
    seed: int
    ledger: Ledger
    passed: Natural  # boundaries
    loss: Annotated[float, Field(gt=0)]
    curve: list[dict[str, int | Finite | None]]
    grafts: list[Graft]
    prunes: list[Change]
    rollbacks: list[Rollback]
    annealed: list[dict[str, int | Finite | None]]
    failure: str | None
    grafted: list[tuple[Natural, str]]
    lockout: list[tuple[str, str, int]]
    unfinished: bool
    paid: Annotated[float, Field(ge=0)]
    sequence: Natural

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= value < math.inf for value in asdict(self.ledger).values()):
            raise ValueError("the ledger holds what no run can use.")
        if len(self.curve) != self.sequence + 1 or len(self.grafted) != len(self.grafts):
            raise ValueError("its records are not as many as its decisions and grafts.")
        if (self.instance.n_layer or 1) > self.spec.growth.max_layers:
            raise ValueError(f"it starts with {self.instance.n_layer} layers, more than growth.max_layers.")
        if self.passed > self.spec.budget.decisions:
            raise ValueError(f"it has passed {self.passed} of {self.spec.budget.decisions} decisions.")
        for point in self.curve:
            if not (point.get("val_loss") or 0) > 0 or not (point.get("budget_fraction") or 0) >= 0:
                raise ValueError("a point of its curve has no loss, or no place in the budget.")
        return self
