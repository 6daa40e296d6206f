"""What the rest of a budget can pay for, read off telemetry: grafts that can still be trained, and trials of them.

Everything holds for a budget on any axis: a candidate's steps per decision tell what its steps cost beside WAIT's.
"""

import numpy as np

from esper.platform.telemetry import Telemetry


def trainable_grafts(telemetry: Telemetry, tokens_per_parameter: float) -> list[int]:
    """Rows of the legal grafts after which the rest of the budget holds that many tokens per parameter.

    Args:
        telemetry: the observation.
        tokens_per_parameter: tokens, over the rest of the budget, per non-embedding parameter after the graft (about:
            the ratio that it grows by is that of all parameters).
    """
    tokens = _tokens_per_parameter(telemetry)
    return [
        int(i)
        for i in telemetry.legal()
        if telemetry.actions[i].operation == "graft" and tokens[i] >= tokens_per_parameter
    ]


def trial_cost(telemetry: Telemetry, rows: list[int], optimizer_steps: int) -> float:
    """Fraction of the whole budget that training each of these candidates on a copy for some steps would use.

    The constant cost of a graft is left out.
    """
    steps = _steps_per_decision(telemetry)
    return optimizer_steps * float((steps[0] / steps[rows]).sum()) / _steps_in_budget(telemetry)


def decision(telemetry: Telemetry) -> tuple[int, int]:
    """(Number of this decision on the decision clock, counted from 0; decisions in the budget).

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


def _tokens_per_parameter(telemetry: Telemetry) -> np.ndarray:
    """Tokens that the rest of the budget holds after each candidate, per non-embedding parameter now grown.

    At this size the rest would hold seen · (1 − u)/u tokens; a candidate changes the number of steps by the ratio of
    its steps per decision to WAIT's, and the parameters by its own ratio.
    """
    used = max(telemetry.get("budget_used"), 1e-6)
    seen = 10 ** telemetry.get("tokens_per_parameter") - 1
    steps = _steps_per_decision(telemetry)
    return seen * (1 - used) / used * steps / steps[0] / np.exp(telemetry.candidate_column("parameters"))
