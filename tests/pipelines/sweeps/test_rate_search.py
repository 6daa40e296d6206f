"""The search for a learning rate, on losses with a known best rate, and the curve through known rates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.pipelines.sweeps.rate_search import FACTOR, ROUNDS, best_rate, bracketed, fitted_curve, next_rates


def search(start: float, best: float) -> tuple[dict[float, list[float]], int]:
    """Rates tried, and rounds, where the loss is a parabola in the logarithm with its bottom at `best`."""
    losses: dict[float, list[float]] = {}
    for rounds in range(ROUNDS):
        rates = next_rates(start, losses)
        if not rates:
            return losses, rounds
        losses |= {rate: [math.log(rate / best) ** 2 + 1, math.log(rate / best) ** 2 + 1.1] for rate in rates}
    return losses, ROUNDS


@given(st.floats(1e-5, 0.1), st.floats(-4.4, 4.4))
def test_it_ends_within_half_a_factor_of_the_best(start, powers):
    best = start * FACTOR**powers
    losses, _ = search(start, best)
    assert abs(math.log(best_rate(losses) / best)) <= math.log(FACTOR) * 0.51 + 0.01  # 0.01: rates are rounded


@given(st.floats(1e-5, 0.1), st.floats(-4.4, 4.4))
def test_the_best_lies_between_two_others(start, powers):
    losses, _ = search(start, start * FACTOR**powers)
    assert bracketed(losses)


def test_it_stops_after_some_rounds_where_the_best_is_far_away():
    losses, rounds = search(1e-3, 1.0)
    assert rounds == ROUNDS
    assert not bracketed(losses)
    assert len(losses) == 3 + ROUNDS - 1


def test_a_run_that_failed_is_never_the_best():
    assert best_rate({0.1: [math.inf, 1.0], 0.2: [2.0, 2.0]}) == 0.2


def test_of_equal_rates_the_lowest():
    assert best_rate({0.2: [1.0], 0.1: [1.0]}) == 0.1


@given(st.floats(1e-4, 0.1), st.floats(0, 1.5))
def test_the_curve_goes_through_a_power_law(rate, exponent):
    sizes = (10_000, 20_000, 40_000, 90_000)
    rates = {size: rate * (size / 10_000) ** -exponent for size in sizes}
    curve = fitted_curve(rates)
    for size in sizes:
        assert curve.rate_max >= max(rates.values())
        told = curve.learning_rate * (size / curve.rate_parameters) ** -curve.rate_exponent
        assert told == pytest.approx(rates[size], rel=0.02)


def test_rates_that_rise_with_size_give_a_constant():
    curve = fitted_curve({10_000: 0.01, 40_000: 0.02})
    assert curve.rate_exponent == 0
    assert curve.learning_rate == pytest.approx(0.0141, abs=1e-4)


def test_one_size_gives_its_own_rate():
    assert vars(fitted_curve({12_345: 0.0123})) == {
        "learning_rate": 0.0123,
        "rate_exponent": 0.0,
        "rate_parameters": 12_345,
        "rate_max": 0.0123,
    }
