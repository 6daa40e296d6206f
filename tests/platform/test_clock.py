"""The decision clock and the ledger: boundaries, overshoot, merged decisions, totals that add up."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.clock import DecisionClock
from esper.platform.ledger import AXES, Ledger


@given(st.integers(1, 60), st.floats(1.0, 1e9), st.floats(1e-3, 0.6), st.floats(0.0, 3.0))
def test_every_run_passes_each_boundary_and_ends(decisions, amount, step, jump):
    """Steps of any size, one jump (a graft's cost) of any size: decisions only go up, and end at K exactly."""
    clock = DecisionClock(amount, decisions)
    reading, seen = jump * clock.slice, 0
    while not clock.spent:
        boundary = clock.boundary
        reading += step * clock.slice  # at least one, as training does
        while reading < boundary:
            reading += step * clock.slice
        clock.advance(reading)
        seen += 1
        assert clock.passed >= seen
        assert reading - clock.passed * clock.slice < clock.slice * (1 + 1e-6) or clock.spent
    assert clock.passed == decisions
    assert reading >= amount * (1 - 1e-6)


def test_a_cost_past_a_boundary_merges_decisions_and_rounding_is_forgiven():
    for amount, decisions, reading, passed in ((100, 10, 47, 4), (0.3, 3, 0.1 + 0.1 + 0.1 - 1e-16, 3)):
        clock = DecisionClock(amount, decisions)
        clock.advance(reading)
        assert clock.passed == passed


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 10), st.integers(0, 5)), max_size=20))
def test_the_ledger_adds_up(charges):
    ledger, copies = Ledger(), Ledger(steps=7)
    for parameters, seconds, steps in charges:
        began = Ledger(**asdict(ledger))
        amounts = {"steps": steps, "tokens": 8 * steps, "flops": 64.0 * steps}
        sizes = {"parameters": parameters, "parameters_non_embedding": parameters // 2}
        ledger.charge(seconds=seconds, wall_seconds=2 * seconds, **sizes, **amounts)
        copies.add(ledger.less(began))
    assert ledger.parameter_seconds == pytest.approx(sum(n * s for n, s, _ in charges))
    assert ledger.tokens == 8 * ledger.steps
    assert ledger.wall_seconds == pytest.approx(2 * ledger.seconds)
    wanted = [getattr(ledger, axis) + 7 * (axis == "steps") for axis in AXES]
    assert [getattr(copies, axis) for axis in AXES] == pytest.approx(wanted)
