"""The search for the best static size, on losses with a known best. Alone: `pytest …/sweeps/test_size_search.py`."""

import math
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.pipelines.sweeps.size_search import best_size, neighbours, next_sizes
from esper.pipelines.sweeps.sizes import Size
from esper.platform.spec import RunSpec, load_spec

SPEC = load_spec("tinystories-char")  # a layer of 128 neurons and 2 heads, up to 6 layers


def search(spec: RunSpec, layers: float, width: float, heads: float, decline: float = 0.0) -> dict[Size, float]:
    """What is tried, where the loss is a bowl in the logarithms with a bottom there; `decline` favours larger sizes."""
    losses: dict[Size, float] = {}
    while new := next_sizes(spec, losses):
        for size in new:
            assert size not in losses
            away = [math.log(a / b) for a, b in zip(size.numbers(spec.host), (layers, width, heads), strict=True)]
            losses[size] = sum(x**2 for x in away) + 0.3 * away[0] * away[1] - decline * sum(away)
    return losses


@given(st.floats(1, 6), st.floats(32, 800), st.floats(1, 16))
def test_it_ends_at_a_size_that_has_no_better_neighbour_which_is_near_the_bottom(layers, width, heads):
    losses = search(SPEC, layers, width, heads)
    best = best_size(losses)
    near = list(chain.from_iterable(neighbours(SPEC, best)))
    assert losses.keys() >= set(near)
    assert all(losses[size] >= losses[best] for size in near)
    found = best.numbers(SPEC.host)
    for value, bottom, factor in zip(found, (layers, width, heads), (2, 1.5, 2), strict=True):
        assert abs(math.log(value / bottom)) <= math.log(factor)
    assert len(losses) <= 40
    assert all(size.numbers(SPEC.host)[1] % 32 == 0 for size in losses)


def test_it_tries_few_sizes_and_names_the_presets_own_as_sizes_do():
    tried = list(map(str, search(SPEC, 2, 192, 2)))
    assert tried == ["1", "2", "3", "2x96", "2x192", "1x192", "3x192", "2x288", "2x192h1", "2x192h4"]


@pytest.mark.parametrize(
    ("kind", "budget", "best"),
    [("block", 3e6, "6"), ("block", 2e4, "3"), ("ffn", 2e4, "1x640"), ("attention", 2e4, "1h8")],
)
def test_it_goes_no_farther_than_growing_and_the_budget(kind, budget, best):
    """Where larger is always better: as many layers as allowed, no axis without a blueprint, no more than a budget."""
    spec = SPEC.overridden({"growth.blueprints": {kind: {}}, "budget.amount": budget})
    assert str(best_size(search(spec, 1, 128, 2, decline=100))) == best


def test_of_a_resnet_it_tries_whole_groups_of_channels_only():
    """A quarter of its width is no whole group: each second width would be refused, and end the line."""
    changes = {
        "host.channels": 16,
        "host.group": 8,
        "growth.blueprints": {"conv_width": {"width": 8}, "conv_block": {}},
    }
    spec = load_spec("cifar10-cpu").overridden(changes)
    assert best_size(search(spec, 1, 64, 1)).numbers(spec.host)[1] == pytest.approx(64, rel=0.3)
