"""Lag takes the graft that did best on copies of the run, and pays for all it tried."""

import numpy as np
import pytest

from esper.platform.contracts import GraftAction
from esper.platform.errors import UserError
from esper.policies.lag import LagPolicy, Limits
from esper.workers.probe import ChargedProbe
from esper.workers.run import GrowthRun

LIMITS = Limits(steps=6, patience=0.1, cost=10.0, tokens_per_parameter=0.0)


@pytest.fixture
def run(tiny_spec, tokens):
    budget = tiny_spec.budget.model_copy(update={"amount": 800})
    run = GrowthRun(tiny_spec.model_copy(update={"budget": budget}), tokens)
    run.reset(seed=0)
    run.step(GraftAction(0, 0))
    return run


def test_it_takes_the_best_of_what_it_tried_and_is_charged(run):
    rows = [int(i) for i in run.telemetry.legal()]
    losses, _ = run.twins([GraftAction(row, 1) for row in rows], 6)
    steps, before = run.ledger.steps, run.trainer.steps
    action = LagPolicy(LIMITS).act(run.telemetry, ChargedProbe(run))
    assert action.index == rows[int(np.argmin(losses[:, -3:].mean(axis=1)))]
    assert run.ledger.steps - steps == 6 * len(rows)
    assert run.trainer.steps == before


def test_a_trial_that_costs_too_much_is_left_out(run):
    action = LagPolicy(Limits(steps=6, patience=0.1, cost=1e-6, tokens_per_parameter=0.0)).act(
        run.telemetry, ChargedProbe(run)
    )
    assert action.index == 0
    assert "would cost" in action.reason


def test_without_copies_it_says_so(run):
    with pytest.raises(UserError, match="copies of the run"):
        LagPolicy().act(run.telemetry)
