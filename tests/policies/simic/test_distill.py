"""The median schedule of episodes: counts, moments, sites. Alone: `pytest tests/policies/simic/test_distill.py`."""

import numpy as np

from esper.policies.schedule import Entry
from esper.policies.simic import distill


def block(fraction, site="wte.stream", blueprint="block"):
    return {"budget_fraction": fraction, "blueprint": blueprint, "site": site}


def ffn(fraction, site="h0.ffn"):
    return block(fraction, site, "ffn")


def median_schedule(episodes, *arguments):
    return distill.median_schedule([{"grafts": grafts} for grafts in episodes], *arguments)


def test_episodes_that_are_alike_are_their_own_schedule():
    grafts = [block(0.0), ffn(0.25), block(0.25), ffn(0.5, "h1.ffn")]
    assert median_schedule([grafts] * 3, 8) == [
        Entry(at=0.0, blueprint="block"),
        Entry(at=0.25, blueprint="block"),
        Entry(at=0.25, blueprint="ffn"),
        Entry(at=0.5, blueprint="ffn"),
    ]


def test_a_blueprint_comes_as_often_as_in_the_median_episode():
    episodes = [[block(0.125)] * n + [ffn(0.5)] * m for n, m in ((0, 1), (1, 0), (2, 0), (2, 0), (9, 1))]
    assert [entry.blueprint for entry in median_schedule(episodes, 8)] == ["block", "block"]
    assert median_schedule([[], [], [block(0.5)]], 8) == []
    assert len(median_schedule([[], [block(0.5)]], 8)) == 1  # a half counts as one


def test_the_jth_graft_is_due_at_the_median_of_those_that_have_one():
    episodes = [[block(0.125)], [block(0.25), block(0.5)], [block(0.5), block(0.75)], [block(0.25), block(0.625)]]
    assert [entry.at for entry in median_schedule(episodes, 8)] == [0.25, 0.625]


def test_an_entry_is_due_at_the_decision_that_it_was_taken_at():
    """Whatever the overshoot past the boundary, and through the telemetry's float32."""
    random = np.random.default_rng(0)
    for decisions, k in ((7, 5), (24, 7), (1000, 3), (1000, 997)):
        taken = [[block((k + share) / decisions)] for share in random.uniform(0, 0.4, 5)]
        at = median_schedule(taken, decisions)[0].at
        assert (k - 1 + 0.5) / decisions < at <= np.float32(k / decisions)


def test_a_site_is_named_if_most_took_it_and_every_episode_has_it():
    episodes = [[block(0.5, site)] for site in ("wte.stream", "wte.stream", "h0.stream")]
    assert median_schedule(episodes, 8, {"wte.stream"})[0].site == "wte.stream"
    assert median_schedule(episodes, 8, {"h0.stream"})[0].site is None
    assert median_schedule(episodes[1:], 8, {"wte.stream"})[0].site is None
