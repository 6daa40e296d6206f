"""A sweep's arms, sizes and grid, as its command line names them."""

import pytest

from esper.pipelines.sweeps.arms import FOLLOWERS, NOT_GROWN, parse_arms, parse_sizes
from esper.pipelines.sweeps.plan import Point, parse_grid
from esper.platform.errors import UserError


def labels(text: str, sizes=(1, 2)) -> list[str]:
    return [arm.label for arm in parse_arms(text, sizes)]


def test_static_arms_come_first_one_for_each_size_and_followers_last():
    assert labels("random,tamiyo,baseline,onejump") == ["static-1", "static-2", "tamiyo", "onejump", "random:tamiyo"]
    assert (*NOT_GROWN, *FOLLOWERS) == (
        *("static", "static_final", "static_lrpath"),
        *("random", "static_final", "static_lrpath"),
    )


def test_whom_a_follower_follows():
    assert labels("onejump,tamiyo,ppo,static_final")[-1] == "static_final:ppo"
    assert labels("gradual,onejump,static_lrpath")[-1] == "static_lrpath:gradual"
    both = labels("tamiyo,ppo,static_final:heuristic,static_final:ppo")
    assert both[-2:] == ["static_final:tamiyo", "static_final:ppo"]
    assert labels("static,random") == ["static-1", "static-2", "random"]  # nobody to match


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        (" , ", "names no arm"),
        ("static,tamio", "Did you mean 'tamiyo'"),
        ("static,static_final", "--arms names none such: add one, such as tamiyo"),
        ("static,tamiyo,static_final:ppo", "'static_final:ppo' cannot be"),
        ("tamiyo,static_final:random", "--arms names tamiyo"),
        ("tamiyo,lag:tamiyo", "'lag:tamiyo' cannot be"),
    ],
)
def test_arms_that_cannot_be(arms, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_arms(arms, [1])


def test_sizes():
    assert parse_sizes("4, 1,2,1") == [1, 2, 4]
    for text in ("", "0", "1,x", "-1"):
        with pytest.raises(UserError, match="is not a list of layers"):
            parse_sizes(text)


def test_a_grid_spans_every_combination_also_of_lists_and_objects():
    points = parse_grid(["budget.amount=20,40", "host.n_head=1,2,4"])
    assert len(points) == 6
    assert points[1] == {"budget.amount": 20, "host.n_head": 2}
    assert parse_grid([]) == [{}]
    assert [p["budget.cooldowns"] for p in parse_grid(["budget.cooldowns=[],[0.3,0.5]"])] == [[], [0.3, 0.5]]
    kinds = parse_grid(['growth.blueprints={"ffn": {}},{"ffn": {}, "block": {}}'])
    assert [list(point["growth.blueprints"]) for point in kinds] == [["ffn"], ["ffn", "block"]]


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (["budget.amount"], "is not of the form"),
        (["budget.amount="], "is not of the form"),
        (["budget.amount=1", "budget.amount=2"], "twice"),
        (["data.tokenizer=char,bpe:64"], "would change the text"),
        (["fleet.cpus=1,2"], "changes no number of a run"),
    ],
)
def test_grids_that_cannot_be(grid, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_grid(grid)


def test_a_point_is_told_by_its_values(tiny_spec):
    assert Point(0, {"b": 1, "a": 2}, tiny_spec).grid == '{"a": 2, "b": 1}'
