"""A sweep's arms, sizes and grid, as its command line names them; and its trials' names and specs."""

import json
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper.pipelines.demo import DemoArguments
from esper.pipelines.sweeps.arms import Arm, parse_arms
from esper.pipelines.sweeps.plan import Point, SweepArguments, SweepPlan, Trial, parse_budgets, parse_grid
from esper.pipelines.sweeps.sizes import Size, lrpath_spec, parse_sizes, with_rates
from esper.pipelines.sweeps.stages import PointStages, Settled
from esper.platform.contracts import GraftAction
from esper.platform.spec import load_spec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.rate import rate


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("random,tamiyo,baseline,onejump", "static-1 static-2 tamiyo onejump random:tamiyo"),
        ("onejump,tamiyo,ppo,static_final", "onejump tamiyo ppo static_final:ppo"),
        ("gradual,onejump,static_lrpath", "gradual onejump static_lrpath:gradual"),
        ("tamiyo,ppo,static_final:heuristic,static_final:ppo", "tamiyo ppo static_final:tamiyo static_final:ppo"),
        ("static,random", "static-1 static-2 random"),  # nobody to match
        ("tamiyo,ppo:a,ppo,ppo:baseline", "tamiyo ppo ppo:a ppo:baseline"),
    ],
)
def test_static_arms_come_first_one_for_each_size_and_followers_last(text, labels):
    assert [arm.label for arm in parse_arms(text, parse_sizes("1,2"))] == labels.split()


def test_sizes_and_a_grid_that_spans_every_combination_also_of_lists_and_objects(tiny_spec):
    assert list(map(str, parse_sizes("4, 1,2x96,1h4,3x8h2,1"))) == ["4", "1", "2x96", "1h4", "3x8h2"]
    assert list(map(str, parse_sizes("1,1"))) == ["1"]
    points = parse_grid(["host.n_head=1,2,4"], "40,2e1,40.0")
    assert len(points) == 6
    assert points[1] == {"budget.amount": 20, "host.n_head": 2}
    assert json.dumps(parse_budgets("0.5e6,2.5")) == "[2.5, 500000]"
    assert parse_grid([]) == [{}]
    assert [p["budget.cooldowns"] for p in parse_grid(["budget.cooldowns=[],[0.3,0.5]"])] == [[], [0.3, 0.5]]
    kinds = parse_grid(['growth.blueprints={"ffn": {}},{"ffn": {}, "block": {}}'])
    assert [list(point["growth.blueprints"]) for point in kinds] == [["ffn"], ["ffn", "block"]]
    assert Point(0, {"b": 1, "a": 2}, tiny_spec).grid == '{"a": 2, "b": 1}'


def test_names_tell_trials_apart(tiny_spec):
    arm, points = Arm(name="random", of="tamiyo"), [Point(index, {}, tiny_spec, several=True) for index in (0, 1)]
    trials = [Trial(arm, "test", seed, point, tiny_spec) for seed in (0, 1) for point in points]
    trials += [Trial(arm, "rates", 0, points[0], tiny_spec, note=note) for note in ("rate0.1", "rate0.2")]
    assert len({trial.name for trial in trials}) == len(trials)
    assert trials[1].name == "random.of.tamiyo-seed0-point1"
    assert trials[1].tags()["label"] == "random:tamiyo"


def test_a_static_size_may_be_larger_than_growing_may_get_and_has_its_own_rate(tiny_spec):
    one, five = parse_sizes("1,5")
    spec = with_rates(five.born(tiny_spec), [(five, 0.02), (one, 0.03)])
    assert (spec.host.n_layer, spec.growth.max_layers) == (5, 5)
    assert rate(spec.optimizer, 0.5, five.parameters(tiny_spec)) == 0.02
    assert rate(spec.optimizer, 0.5, one.parameters(tiny_spec)) == 0.03


def test_a_static_size_of_widths_and_heads_is_the_shape_that_grafts_of_these_lead_to(tiny_spec):
    grown = start_shape(tiny_spec, 96).with_units("h0.ffn", 8).with_units("h0.attention", 1)
    assert start_shape(Size.of("1x72h3").born(tiny_spec), 96).layers == grown.layers
    assert start_shape(Size.of("1x72h3").born(tiny_spec), 96).head_dim == grown.head_dim
    assert Size.of("1x64h2").parameters(tiny_spec) == Size.of("1").parameters(tiny_spec)


def test_a_static_size_under_another_runs_rate(tiny_spec, tokens):
    def rates(spec, graft_at: int) -> list[float]:
        run = GrowthRun(spec, tokens)
        run.reset(seed=0)
        while not run.ended:
            number = run.telemetry.sequence
            run.step(GraftAction(run.telemetry.legal()[-1] if number == graft_at else 0, number))
        curves.append(run.summary()["val_curve"])
        return [point["learning_rate"] for point in run.curve if point["budget_fraction"] >= spec.optimizer.warmup]

    changes = {"optimizer.rate_exponent": 0.5, "optimizer.rate_parameters": 3000, "growth.probation_steps": 8}
    curves, spec = [], tiny_spec.overridden(changes)
    grown = rates(spec, 2)
    followed = lrpath_spec(spec, Size(layers=1), curves[0])
    assert followed.host.n_layer == 1
    assert rates(followed, -1) == pytest.approx(grown, rel=1e-6)
    assert grown[0] > 1.1 * grown[5]  # the graft has lowered it


def test_the_demos_own_arguments_make_a_plan():
    plan = SweepPlan.settled(DemoArguments(), load_spec("demo"))
    assert (len(plan.seeds), len(plan.grid), len(plan.sizes)) == (2, 2, 3)


@pytest.mark.parametrize("known", [{"checkpoint": "x"}, None])
def test_a_controller_is_trained_at_its_first_budget_whoever_comes_first(monkeypatch, known):
    """And a resume trains it again where that failed."""
    spec, trained = load_spec("tinystories-char"), list[int]()
    plan = SweepPlan.settled(SweepArguments(arms="static,ppo", budgets="1e6,4e6"), spec)
    any_: Any = SimpleNamespace(out=Path("sweep"))

    def train(self: PointStages) -> None:
        trained.append(self.point.index)
        self.settled["controller"], self.failed = known, "" if known else "the disk is full"

    monkeypatch.setattr(PointStages, "_train_controller", train)
    monkeypatch.setattr(PointStages, "_choose", lambda self: iter([("rates", [], True)] * (2 - 2 * self.point.index)))
    for settled in (Settled(), Settled(controller=None)):
        points = [PointStages(any_, plan, point, settled, {}, any_) for point in plan.points(spec)]
        points[1].trainer = points[0]
        assert len(list(zip_longest(*(point.choices() for point in points)))) == 2
        assert [point.settled["controller"] for point in points] == [known, known]
    assert trained == [0, 0]
