"""What the rest of a budget can pay for, read off telemetry: grafts that can still be trained, and trials of them.

Everything holds for a budget on any axis: a candidate's steps per decision tell what its steps cost beside WAIT's.
"""

import numpy as np

from esper.platform.telemetry import Telemetry


def trainable_grafts(telemetry: Telemetry, tokens_per_parameter: float) -> list[int]:
    """Rows of the legal grafts after which the rest of the budget holds that many tokens per parameter.

    A parameter is a non-embedding one after the graft, about: the ratio that it grows by is that of all parameters.
    """
    # At this size the rest would hold seen · (1 − u)/u tokens; a candidate changes the number of steps by the ratio of
    # its steps per decision to WAIT's, and the parameters by its own ratio.
    used = max(telemetry.get("budget_used"), 1e-6)
    seen = 10 ** telemetry.get("tokens_per_parameter") - 1
    steps = _steps_per_decision(telemetry)
    tokens = seen * (1 - used) / used * steps / steps[0] / np.exp(telemetry.candidate_column("parameters"))
    grafts = [int(i) for i in telemetry.legal() if telemetry.actions[i].operation == "graft"]
    return [i for i in grafts if tokens[i] >= tokens_per_parameter]


def trial_cost(telemetry: Telemetry, rows: list[int], optimizer_steps: int) -> float:
    """Fraction of the whole budget that training each candidate on a copy uses, but for a graft's constant cost."""
    steps = _steps_per_decision(telemetry)
    return optimizer_steps * float((steps[0] / steps[rows]).sum()) / _steps_in_budget(telemetry)


def decision(telemetry: Telemetry) -> tuple[int, int]:
    """(Number of this decision on the decision clock, from 0; decisions in the budget).

    The clock's number, not the observation's: a cost that ran past a boundary has merged decisions.
    """
    decisions = round(_steps_in_budget(telemetry) / float(_steps_per_decision(telemetry)[0]))
    return round((1 - telemetry.get("decisions_left")) * decisions), decisions


def _steps_per_decision(telemetry: Telemetry) -> np.ndarray:
    """Of each candidate, float64 (present candidates,)."""
    return 10 ** telemetry.candidate_column("steps_per_decision").astype(np.float64) - 1


def _steps_in_budget(telemetry: Telemetry) -> float:
    """Optimizer steps that the whole budget would hold at this size."""
    return (10 ** telemetry.get("steps_left") - 1) / (1 - telemetry.get("budget_used"))
