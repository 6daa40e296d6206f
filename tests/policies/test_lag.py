"""Lag takes the graft that did best on copies of the run, pays for all it tried, and leaves the run as it was."""

from dataclasses import replace

import numpy as np
import pytest

from esper.platform.contracts import GraftAction
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.policies.budget_rules import decision, trial_cost
from esper.policies.lag import LagPolicy
from esper.workers.laws.surrogate import SurrogateRun
from tests.workers.growing_run import begun, changed

LAG = LagPolicy(steps=6, patience=0.1, cost=0.05, tokens_per_parameter=0.0)


def begin(tiny_spec, tokens, *, amount=800.0, axis="steps", clock=None, **growth):
    """A run of 800 steps in 8 decisions after its first: a trial of 4 grafts over 6 steps is 30 of them."""
    spec = changed(tiny_spec, budget={"amount": amount, "axis": axis}, clock=clock or {}, growth=growth)
    return begun(spec, tokens, None)


@pytest.fixture
def run(tiny_spec, tokens):
    return begin(tiny_spec, tokens, probation_steps=2)  # short, so that six steps tell the grafts apart


class Scripted:
    """A probe whose twins have the given losses; without any it must not be used."""

    def __init__(self, *losses):
        self.losses = losses

    def twins(self, actions, optimizer_steps):
        assert len(actions) == len(self.losses)
        return np.repeat(np.array(self.losses)[:, None], optimizer_steps, axis=1)


def tried(run):
    """What lag tries: WAIT and every legal graft."""
    rows = [int(i) for i in run.telemetry.legal() if run.telemetry.actions[i].operation in ("wait", "graft")]
    return [GraftAction(row, run.telemetry.sequence) for row in rows]


def test_it_takes_the_lowest_loss_of_its_twins(run):
    actions = tried(run)
    means = run.fork().twins(actions, 6)[:, -3:].mean(axis=1)
    assert len(set(means.tolist())) == len(means)
    chosen = LAG.act(run.telemetry, run)
    assert chosen.index == actions[int(means.argmin())].index > 0
    assert chosen.sequence == run.telemetry.sequence
    assert "of 4 tried" in chosen.reason
    assert LAG.act(run.telemetry, run).index == chosen.index


@pytest.mark.parametrize("axis", ["parameter_seconds", "flops"])
def test_what_a_trial_costs_is_known_beforehand(tiny_spec, tokens, axis):
    whole = begin(tiny_spec, tokens)
    amount = 800 / whole.ledger.steps * whole.ledger.read(axis)
    clock = {"graft_seconds": 0.0}  # a graft's own is left out
    run = begin(tiny_spec, tokens, amount=amount, axis=axis, clock=clock)
    actions, before = tried(run), run.reading()
    run.twins(actions, 6)
    predicted = trial_cost(run.telemetry, [action.index for action in actions], 6)
    assert predicted == pytest.approx((run.reading() - before) / amount, rel=1e-3)


def test_waiting_wins_where_no_graft_is_ahead_and_what_diverged_is_never_chosen(run):
    nan = np.nan
    assert "none of 4" in LAG.act(run.telemetry, Scripted(1.0, 1.0, 1.1, 1.2, 1.3)).reason
    assert LAG.act(run.telemetry, Scripted(1.0, nan, 0.9, -np.inf, 0.95)).index == tried(run)[2].index
    assert LAG.act(run.telemetry, Scripted(*[nan] * 5)).index == 0


@pytest.mark.parametrize(
    ("lag", "reason"),
    [
        (replace(LAG, cost=0.03), "would cost 3.8% of the budget > 3.0%"),
        (replace(LAG, steps=110, cost=1.0), "the rate would decay"),
        (replace(LAG, patience=0.25), "every 2 decisions"),
        (replace(LAG, tokens_per_parameter=1e9), "can train"),
    ],
)
def test_it_tries_nothing(run, lag, reason):
    action = lag.act(run.telemetry, Scripted())
    assert action.index == 0
    assert reason in action.reason


def test_it_tries_nothing_where_nothing_is_legal_or_known(tiny_spec, tokens):
    run = begin(tiny_spec, tokens, max_parameters=1)
    assert run.telemetry.legal().tolist() == [0]
    assert LAG.act(run.telemetry, Scripted()).index == 0
    with pytest.raises(UserError, match="lag tries grafts on copies of the run"):
        LagPolicy().act(run.telemetry)
    assert LAG.act(run.reset(seed=0), Scripted()).reason == "no slope yet"


def test_the_decisions_number_is_read_off_telemetry():
    run = SurrogateRun(load_spec("demo"))
    telemetry = run.reset(seed=0)
    while not run.ended:
        assert decision(telemetry) == (telemetry.sequence, run.spec.budget.decisions)
        telemetry = run.step(GraftAction(int(telemetry.legal()[-1]), telemetry.sequence)).telemetry
