"""What the rest of a budget, on any axis, can pay for, read off telemetry."""

import numpy as np

from esper.platform.telemetry import Telemetry


def trainable_grafts(telemetry: Telemetry, tokens_per_parameter: float) -> list[int]:
    """Legal graft rows after which the rest holds that many tokens per (non-embedding, roughly) parameter."""
    # The rest holds seen · (1 − u)/u tokens at this size, scaled by steps per decision over WAIT's.
    used = max(telemetry.get("budget_used"), 1e-6)
    seen = 10 ** telemetry.get("tokens_per_parameter") - 1
    steps = _steps_per_decision(telemetry)
    tokens = seen * (1 - used) / used * steps / steps[0] / np.exp(telemetry.candidate_column("parameters"))
    return [i for i in legal_grafts(telemetry) if tokens[i] >= tokens_per_parameter]


def legal_grafts(telemetry: Telemetry) -> list[int]:
    """Rows of the grafts that are legal now."""
    return [int(i) for i in telemetry.legal() if telemetry.actions[i].operation == "graft"]


def steps_left(telemetry: Telemetry) -> float:
    """Optimizer steps that the rest of the budget holds at this size."""
    return 10 ** telemetry.get("steps_left") - 1


def step_costs(telemetry: Telemetry) -> np.ndarray:
    """What a step costs after each candidate, on the budget's axis, over WAIT's, float64 (A',)."""
    steps = _steps_per_decision(telemetry)
    return steps[0] / np.maximum(steps, 1e-9)


def slope_per_step(telemetry: Telemetry) -> float:
    """The part of the validation loss that a step takes off it now; the slow slope may span the first fall."""
    return min(telemetry.get("slope_fast"), telemetry.get("slope_slow")) / _steps_in_budget(telemetry)


def trial_cost(telemetry: Telemetry, rows: list[int], optimizer_steps: int) -> float:
    """Fraction of the budget that training copies for these rows uses, less grafts' constant cost."""
    return optimizer_steps * float(step_costs(telemetry)[rows].sum()) / _steps_in_budget(telemetry)


def decision(telemetry: Telemetry) -> tuple[int, int]:
    """Number on the decision clock, from 0 (merged decisions count), and decisions in the budget."""
    decisions = round(_steps_in_budget(telemetry) / float(_steps_per_decision(telemetry)[0]))
    return round((1 - telemetry.get("decisions_left")) * decisions), decisions


def _steps_per_decision(telemetry: Telemetry) -> np.ndarray:
    return 10 ** telemetry.candidate_column("steps_per_decision").astype(np.float64) - 1


def _steps_in_budget(telemetry: Telemetry) -> float:
    return steps_left(telemetry) / (1 - telemetry.get("budget_used"))
