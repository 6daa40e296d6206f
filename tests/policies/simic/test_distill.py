"""The median schedule of episodes: counts, moments, sites."""

import numpy as np

from esper.policies.simic import distill


def block(fraction, site="wte.stream", blueprint="block"):
    return {"budget_fraction": fraction, "blueprint": blueprint, "site": site}


def ffn(fraction):
    return block(fraction, "h0.ffn", "ffn")


def median_schedule(episodes, decisions=8, sites=()):
    entries = distill.median_schedule([{"grafts": grafts} for grafts in episodes], decisions, sites)
    return [(entry.at, entry.blueprint, entry.site) for entry in entries]


def test_the_schedule_is_that_of_the_median_episode():
    alike = [block(0.0), ffn(0.25), block(0.25), ffn(0.5)]
    own = [(0.0, "block"), (0.25, "block"), (0.25, "ffn"), (0.5, "ffn")]
    assert median_schedule([alike] * 3) == [(*each, None) for each in own]
    counts = ((0, 1), (1, 0), (2, 0), (2, 0), (9, 1))
    assert median_schedule([[block(0.5)] * n + [ffn(0.5)] * m for n, m in counts]) == [(0.5, "block", None)] * 2
    assert median_schedule([[], [], [block(0.5)]]) == []
    assert len(median_schedule([[], [block(0.5)]])) == 1  # a half counts as one
    episodes = [[block(0.125)], [block(0.25), block(0.5)], [block(0.5), block(0.75)], [block(0.25), block(0.625)]]
    assert [at for at, *_ in median_schedule(episodes)] == [0.25, 0.625]  # the j-th by those that have one


def test_an_entry_is_due_at_the_decision_that_it_was_taken_at():
    """Whatever the overshoot past the boundary, and through the telemetry's float32."""
    random = np.random.default_rng(0)
    for decisions, k in ((7, 5), (24, 7), (1000, 3), (1000, 997)):
        taken = [[block((k + share) / decisions)] for share in random.uniform(0, 0.4, 5)]
        [(at, *_)] = median_schedule(taken, decisions)
        assert (k - 1 + 0.5) / decisions < at <= np.float32(k / decisions)


def test_a_site_is_named_if_most_took_it_and_every_episode_has_it():
    episodes = [[block(0.5, site)] for site in ("wte.stream", "wte.stream", "h0.stream")]
    assert median_schedule(episodes, sites={"wte.stream"}) == [(0.5, "block", "wte.stream")]
    for other, sites in ((episodes, {"h0.stream"}), (episodes[1:], {"wte.stream"})):
        assert median_schedule(other, sites=sites) == [(0.5, "block", None)]
