"""The search for a learning rate, on losses with a known best rate, and the rates by size that it leads to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.pipelines.sweeps.rates import FACTOR, ROUNDS, best_rate, bracketed, next_rates
from esper.platform.spec import OptimizerSpec
from esper.workers.tolaria.rate import stable_rate


def search(start: float, best: float) -> dict[float, list[float]]:
    """Rates tried, where the loss is a parabola in the logarithm with its bottom at `best`."""
    losses: dict[float, list[float]] = {}
    for _ in range(ROUNDS):
        rates = next_rates(start, losses)
        losses |= {rate: [math.log(rate / best) ** 2 + 1, math.log(rate / best) ** 2 + 1.1] for rate in rates}
    return losses


@given(st.floats(1e-5, 0.1), st.floats(-4.4, 4.4))
def test_it_ends_within_half_a_factor_of_the_best_which_lies_between_two_others(start, powers):
    best = start * FACTOR**powers
    losses = search(start, best)
    assert abs(math.log(best_rate(losses) / best)) <= math.log(FACTOR) * 0.51 + 0.01  # 0.01: rates are rounded
    assert bracketed(losses)
    assert next_rates(start, losses) == []


def test_it_stops_after_some_rounds_where_the_best_is_far_away():
    losses = search(1e-3, 1.0)
    assert len(losses) == 3 + ROUNDS - 1
    assert not bracketed(losses)


def test_a_run_that_failed_is_never_the_best_and_of_equal_rates_it_is_the_lowest():
    assert best_rate({0.1: [math.inf, 1.0], 0.2: [2.0, 2.0]}) == 0.2
    assert best_rate({0.2: [1.0], 0.1: [1.0]}) == 0.1


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1)), min_size=1, unique_by=lambda pair: pair[0]))
def test_a_listed_size_has_exactly_its_own_rate_and_others_lie_between(pairs):
    spec = OptimizerSpec(rates=tuple(sorted(pairs)), rate_exponent=0.5)
    for size, rate in spec.rates:
        assert stable_rate(spec, size) == rate
    assert stable_rate(spec, 0.5) == pytest.approx(spec.rates[0][1])
    assert stable_rate(spec, 1e12) == pytest.approx(spec.rates[-1][1])
    for (size, rate), (larger, other) in zip(spec.rates, spec.rates[1:], strict=False):
        assert stable_rate(spec, math.sqrt(size * larger)) == pytest.approx(math.sqrt(rate * other), rel=1e-6)
