"""The ledger: what a run has used so far, on every axis at once.

Parameter-seconds are the integral of N over time, N all parameters (tied ones once). Grafts and trials on copies are
charged; validation, the same for every arm, is kept apart.
"""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

Axis = Literal["parameter_seconds", "steps", "tokens", "seconds", "flops"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass
class Ledger:
    """Running totals: `charge` adds what was done here, `add` what was done on copies."""

    steps: int = 0  # optimizer steps
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0  # by the run's clock
    wall_seconds: float = 0.0  # measured, whatever the clock
    parameter_seconds: float = 0.0
    parameter_seconds_non_embedding: float = 0.0
    validation_seconds: float = 0.0  # wall; not part of any budget

    def charge(self, *, seconds: float, parameters: int, parameters_non_embedding: int, **amounts: float) -> None:
        """Add a step's or a graft's cost at its size; `amounts`: `wall_seconds`, `steps`, `tokens`, `flops`."""
        for name, amount in {"seconds": seconds, **amounts}.items():
            setattr(self, name, getattr(self, name) + amount)
        self.parameter_seconds += parameters * seconds
        self.parameter_seconds_non_embedding += parameters_non_embedding * seconds

    def add(self, other: "Ledger") -> None:
        for name, value in other.as_dict().items():
            setattr(self, name, getattr(self, name) + value)

    def less(self, earlier: "Ledger") -> "Ledger":
        before = earlier.as_dict()
        return Ledger(**{name: value - before[name] for name, value in self.as_dict().items()})  # pyright: ignore

    def read(self, axis: Axis) -> float:
        return float(getattr(self, axis))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)
