"""A sweep's grid."""

import json

import pytest

from esper.pipelines.sweeps.grid import parse_grid
from esper.platform.errors import UserError


def test_a_grid_spans_every_combination(tiny_spec):
    points = parse_grid(["budget.amount=20,40", "host.n_head=1,2,4"], tiny_spec)
    assert len(points) == 6
    assert points[1].values == {"budget.amount": 20, "host.n_head": 2}
    assert (points[1].spec.budget.amount, points[1].spec.host.n_head) == (20, 2)
    assert json.loads(points[1].grid) == points[1].values
    assert parse_grid([], tiny_spec)[0].spec == tiny_spec


def test_a_grid_over_lists_and_objects(tiny_spec):
    points = parse_grid(['growth.blueprints={"ffn": {}},{"ffn": {}, "block": {}}'], tiny_spec)
    assert [list(point.spec.growth.blueprints) for point in points] == [["ffn"], ["ffn", "block"]]
    assert [p.spec.budget.cooldowns for p in parse_grid(["budget.cooldowns=[],[0.3,0.5]"], tiny_spec)] == [
        (),
        (0.3, 0.5),
    ]


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (["budget.amount"], "is not of the form"),
        (["budget.amount="], "is not of the form"),
        (["budget.amont=1,2"], "budget.amount"),
        (["budget.amount=-1"], "budget.amount is -1"),
        (["budget.amount=1", "budget.amount=2"], "twice"),
        (["data.tokenizer=char,bpe:64"], "would change the text"),
    ],
)
def test_grids_that_cannot_be(tiny_spec, grid, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_grid(grid, tiny_spec)
