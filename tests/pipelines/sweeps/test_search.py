"""The searches for a learning rate and its decay, and for the best static size, on losses with a known best."""

import math
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.pipelines.sweeps import search
from esper.pipelines.sweeps.search import DECAYS, FACTOR, ROUNDS, Setting
from esper.pipelines.sweeps.sizes import Size
from esper.platform.spec import OptimizerSpec, RunSpec, load_spec
from esper.workers.tolaria.rate import stable_rate

SPEC = load_spec("tinystories-char")  # a layer of 128 neurons and 2 heads, up to 6 layers


def search_rates(start: float, best: float, decay: float = 0.4) -> dict[Setting, list[float]]:
    """What is tried, where the loss is a parabola in the decay and the rate's logarithm, with a bottom there."""
    losses: dict[Setting, list[float]] = {}
    for _ in range(ROUNDS):
        for setting in search.next_settings(start, DECAYS, losses):
            loss = math.log(setting.rate / best) ** 2 + (setting.decay_from - decay) ** 2
            losses[setting] = [loss + 1, loss + 1.1]
    return losses


@given(st.floats(1e-5, 0.1), st.floats(-4.4, 4.4), st.sampled_from(DECAYS))
def test_it_ends_within_half_a_factor_of_the_best_which_lies_between_two_others(start, powers, decay):
    best = start * FACTOR**powers
    losses = search_rates(start, best, decay)
    found = search.best_setting(losses)
    assert abs(math.log(found.rate / best)) <= math.log(FACTOR) * 0.51 + 0.01  # 0.01: rates are rounded
    assert found.decay_from == decay
    assert search.bracketed(losses)
    assert search.next_settings(start, DECAYS, losses) == []
    assert len(losses) <= len(DECAYS) + ROUNDS


def test_it_stops_after_some_rounds_where_the_best_is_far_away():
    losses = search_rates(1e-3, 1.0)
    assert len(losses) == len(DECAYS) + ROUNDS
    assert not search.bracketed(losses)


def test_a_run_that_failed_is_never_the_best_and_of_equal_rates_it_is_the_lowest():
    low, high = Setting(0.1, 0.4), Setting(0.2, 0.4)
    assert search.best_setting({low: [math.inf, 1.0], high: [2.0, 2.0]}) == high
    assert search.best_setting({high: [1.0], low: [1.0]}) == low


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1)), min_size=1, unique_by=lambda pair: pair[0]))
def test_a_listed_size_has_exactly_its_own_rate_and_others_lie_between(pairs):
    spec = OptimizerSpec(rates=tuple(sorted(pairs)), rate_exponent=0.5)
    for size, rate in spec.rates:
        assert stable_rate(spec, size) == rate
    assert stable_rate(spec, 0.5) == pytest.approx(spec.rates[0][1])
    assert stable_rate(spec, 1e12) == pytest.approx(spec.rates[-1][1])
    for (size, rate), (larger, other) in zip(spec.rates, spec.rates[1:], strict=False):
        assert stable_rate(spec, math.sqrt(size * larger)) == pytest.approx(math.sqrt(rate * other), rel=1e-6)


def search_sizes(spec: RunSpec, layers: float, width: float, heads: float, decline: float = 0.0) -> dict[Size, float]:
    """What is tried, where the loss is a bowl in the logarithms with a bottom there; `decline` favours larger sizes."""
    losses: dict[Size, float] = {}
    while new := search.next_sizes(spec, losses):
        for size in new:
            assert size not in losses
            away = [math.log(a / b) for a, b in zip(size.numbers(spec.host), (layers, width, heads), strict=True)]
            losses[size] = sum(x**2 for x in away) + 0.3 * away[0] * away[1] - decline * sum(away)
    return losses


@given(st.floats(1, 6), st.floats(32, 800), st.floats(1, 16))
def test_it_ends_at_a_size_that_has_no_better_neighbour_which_is_near_the_bottom(layers, width, heads):
    losses = search_sizes(SPEC, layers, width, heads)
    best = search.best_size(losses)
    near = list(chain.from_iterable(search.neighbours(SPEC, best)))
    assert losses.keys() >= set(near)
    assert all(losses[size] >= losses[best] for size in near)
    found = best.numbers(SPEC.host)
    for value, bottom, factor in zip(found, (layers, width, heads), (2, 1.5, 2), strict=True):
        assert abs(math.log(value / bottom)) <= math.log(factor)
    assert len(losses) <= 40
    assert all(size.numbers(SPEC.host)[1] % 32 == 0 for size in losses)


def test_it_tries_few_sizes_and_names_the_presets_own_as_sizes_do():
    tried = list(map(str, search_sizes(SPEC, 2, 192, 2)))
    assert tried == ["1", "2", "3", "2x96", "2x192", "1x192", "3x192", "2x288", "2x192h1", "2x192h4"]


@pytest.mark.parametrize(
    ("kind", "budget", "best"),
    [("block", 3e6, "6"), ("block", 2e4, "3"), ("ffn", 2e4, "1x640"), ("attention", 2e4, "1h8")],
)
def test_it_goes_no_farther_than_growing_and_the_budget(kind, budget, best):
    """Where larger is always better: as many layers as allowed, no axis without a blueprint, no more than a budget."""
    spec = SPEC.overridden({"growth.blueprints": {kind: {}}, "budget.amount": budget})
    assert str(search.best_size(search_sizes(spec, 1, 128, 2, decline=100))) == best


def test_of_a_resnet_it_tries_whole_groups_of_channels_only():
    """A quarter of its width is no whole group: each second width would be refused, and end the line."""
    own = {"host.channels": 16, "host.group": 8, "growth.blueprints": {"conv_width": {"width": 8}, "conv_block": {}}}
    spec = load_spec("cifar10-cpu").overridden(own)
    assert search.best_size(search_sizes(spec, 1, 64, 1)).numbers(spec.host)[1] == pytest.approx(64, rel=0.3)
