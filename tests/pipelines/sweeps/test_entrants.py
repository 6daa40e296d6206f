"""Who takes part in a sweep."""

import pytest

from esper.pipelines.sweeps.entrants import parse_arms, parse_sizes
from esper.platform.errors import UserError


def labels(text: str, sizes=(1, 2)) -> list[str]:
    return [entrant.label for entrant in parse_arms(text, sizes)]


def test_static_arms_come_first_one_for_each_size_and_followers_last():
    assert labels("random,tamiyo,baseline,onejump") == ["static-1", "static-2", "tamiyo", "onejump", "random:tamiyo"]


def test_whom_a_follower_follows():
    assert labels("onejump,tamiyo,ppo,static_final")[-1] == "static_final:ppo"
    assert labels("gradual,onejump,static_lrpath")[-1] == "static_lrpath:gradual"
    assert labels("tamiyo,ppo,static_final:heuristic,static_final:ppo")[-2:] == [
        "static_final:tamiyo",
        "static_final:ppo",
    ]
    assert labels("static,random") == ["static-1", "static-2", "random"]  # nobody to match


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        (" , ", "names no arm"),
        ("static,tamio", "Did you mean 'tamiyo'"),
        ("static,static_final", "names none: add one, such as tamiyo"),
        ("static,tamiyo,static_final:ppo", "does not take part or does not grow"),
        ("tamiyo,static_final:random", "does not take part or does not grow"),
        ("tamiyo,lag:tamiyo", "follows no other arm"),
    ],
)
def test_arms_that_cannot_be(arms, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_arms(arms, [1])


def test_sizes(tiny_spec):
    assert parse_sizes("4, 1,2,1", tiny_spec) == [1, 2, 4]
    assert parse_sizes(None, tiny_spec) == [1]
    for text in ("", "0", "1,x", "-1"):
        with pytest.raises(UserError, match="is not a list of layers"):
            parse_sizes(text, tiny_spec)
