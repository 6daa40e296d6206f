"""The search for a learning rate and its decay, on losses with a known best, and the rates by size it leads to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.pipelines.sweeps.rates import DECAYS, FACTOR, ROUNDS, Setting, best_setting, bracketed, next_settings
from esper.platform.spec import OptimizerSpec
from esper.workers.tolaria.rate import stable_rate


def search(start: float, best: float, decay: float = 0.4) -> dict[Setting, list[float]]:
    """What is tried, where the loss is a parabola in the decay and the rate's logarithm, with a bottom there."""
    losses: dict[Setting, list[float]] = {}
    for _ in range(ROUNDS):
        for setting in next_settings(start, DECAYS, losses):
            loss = math.log(setting.rate / best) ** 2 + (setting.decay_from - decay) ** 2
            losses[setting] = [loss + 1, loss + 1.1]
    return losses


@given(st.floats(1e-5, 0.1), st.floats(-4.4, 4.4), st.sampled_from(DECAYS))
def test_it_ends_within_half_a_factor_of_the_best_which_lies_between_two_others(start, powers, decay):
    best = start * FACTOR**powers
    losses = search(start, best, decay)
    found = best_setting(losses)
    assert abs(math.log(found.rate / best)) <= math.log(FACTOR) * 0.51 + 0.01  # 0.01: rates are rounded
    assert found.decay_from == decay
    assert bracketed(losses)
    assert next_settings(start, DECAYS, losses) == []
    assert len(losses) <= len(DECAYS) + ROUNDS


def test_it_stops_after_some_rounds_where_the_best_is_far_away():
    losses = search(1e-3, 1.0)
    assert len(losses) == len(DECAYS) + ROUNDS
    assert not bracketed(losses)


def test_a_run_that_failed_is_never_the_best_and_of_equal_rates_it_is_the_lowest():
    low, high = Setting(0.1, 0.4), Setting(0.2, 0.4)
    assert best_setting({low: [math.inf, 1.0], high: [2.0, 2.0]}) == high
    assert best_setting({high: [1.0], low: [1.0]}) == low


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1)), min_size=1, unique_by=lambda pair: pair[0]))
def test_a_listed_size_has_exactly_its_own_rate_and_others_lie_between(pairs):
    spec = OptimizerSpec(rates=tuple(sorted(pairs)), rate_exponent=0.5)
    for size, rate in spec.rates:
        assert stable_rate(spec, size) == rate
    assert stable_rate(spec, 0.5) == pytest.approx(spec.rates[0][1])
    assert stable_rate(spec, 1e12) == pytest.approx(spec.rates[-1][1])
    for (size, rate), (larger, other) in zip(spec.rates, spec.rates[1:], strict=False):
        assert stable_rate(spec, math.sqrt(size * larger)) == pytest.approx(math.sqrt(rate * other), rel=1e-6)
