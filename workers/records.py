"""An episode's records, and their saved form."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from esper.platform.contracts import Instance
from esper.platform.frozen import Frozen
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.workers.kasmina.registry import Natural

Finite = Annotated[float, Field(allow_inf_nan=False)]
Point = dict[str, Any]  # of the loss curve, in JSON values: budget fraction, ledger axes, parameters, validation loss
SavedPoints = list[dict[str, int | Finite | None]]


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
    """An episode without its host: fields are `Episode`'s attributes of the same names; callers may add keys."""

    model_config = ConfigDict(extra="ignore")

    spec: RunSpec
    instance: Instance
    seed: int
    ledger: Ledger
    passed: Natural  # boundaries
    loss: Annotated[float, Field(gt=0)]
    curve: SavedPoints
    grafts: list[Graft]
    prunes: list[Change]
    rollbacks: list[Rollback]
    annealed: SavedPoints
    failure: str | None
    grafted: list[tuple[Natural, str]]
    lockout: list[tuple[str, str, int]]
    unfinished: bool
    paid: Annotated[float, Field(ge=0)]
    sequence: Natural

    @model_validator(mode="after")
    def _check(self) -> Self:
        sound = (
            all(0 <= value < math.inf for value in asdict(self.ledger).values())
            and len(self.curve) == self.sequence + 1
            and len(self.grafted) == len(self.grafts)
            and (self.instance.n_layer or 1) <= self.spec.growth.max_layers
            and self.passed <= self.spec.budget.decisions
            and all((point.get("val_loss") or 0) > 0 for point in self.curve)
            and all((point.get("budget_fraction") or 0) >= 0 for point in self.curve)
        )
        if not sound:
            raise ValueError("its records are of no run that could be: restore an older copy of it.")
        return self
