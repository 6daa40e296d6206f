"""A sweep's trials: their names, and the specs that they run under."""

import json

import pytest

from esper.pipelines.sweeps.entrants import Entrant
from esper.pipelines.sweeps.grid import Point, parse_grid
from esper.pipelines.sweeps.trial import COOLDOWNS, Trial, final_spec, lrpath_spec, static_spec, with_cooldowns
from esper.platform.contracts import GraftAction
from esper.policies.arms import ArmInputs
from esper.workers.run import GrowthRun
from esper.workers.tolaria.rate import rate


def test_a_static_size_may_be_larger_than_growing_may_get(tiny_spec):
    spec = static_spec(tiny_spec, 5, 0.02)
    assert (spec.host.n_layer, spec.growth.max_layers) == (5, 5)
    for size in (100, 1_000_000):
        assert rate(spec.optimizer, 0.5, size) == 0.02


def test_names_tell_trials_apart(tiny_spec):
    points = parse_grid(["host.n_head=1,2"], tiny_spec)
    trials = [
        Trial(Entrant("random", of="tamiyo"), purpose, seed, point, tiny_spec, ArmInputs(), note, several=True)
        for purpose, note in (("test", ""), ("rates", "rate0.1"), ("rates", "rate0.2"))
        for seed in (0, 1)
        for point in points
    ]
    assert len({trial.name for trial in trials}) == len(trials)
    assert trials[1].name == "random.of.tamiyo-seed0-point1"
    assert trials[1].tags()["label"] == "random:tamiyo"


def test_a_run_is_born_in_the_shape_that_another_ended_with(tiny_spec, tokens):
    grown = GrowthRun(tiny_spec, tokens)
    grown.reset(seed=3)
    for wanted in ("block", "ffn", "attention"):
        rows = [i for i in grown.telemetry.legal() if grown.telemetry.actions[i].blueprint == wanted]
        grown.step(grown_action(rows[-1], grown))
    ended = grown.summary()
    born = GrowthRun(final_spec(tiny_spec, json.loads(json.dumps(ended["shape"]))), tokens)
    born.reset(seed=3)
    assert born.parameters == ended["parameters"]
    assert born.summary()["shape"] == ended["shape"]
    assert born.trainer.host.shape.flops_per_token() == grown.trainer.host.shape.flops_per_token()


def grown_action(row, run):
    return GraftAction(row, run.telemetry.sequence)


def test_a_static_size_under_another_runs_rate(tiny_spec, tokens):
    spec = tiny_spec.overridden(
        {"optimizer.rate_exponent": 0.5, "optimizer.rate_parameters": 3000, "growth.probation_steps": 8}
    )
    grown = GrowthRun(spec, tokens)
    grown.reset(seed=0)
    while not grown.ended:
        rows = [i for i in grown.telemetry.legal() if grown.telemetry.actions[i].blueprint == "block"]
        grown.step(grown_action(rows[-1] if rows and grown.telemetry.sequence == 2 else 0, grown))
    assert grown.grafts
    followed = lrpath_spec(spec, 1, grown.summary()["val_curve"])
    assert followed.host.n_layer == 1
    static = GrowthRun(followed, tokens)
    static.reset(seed=0)
    while not static.ended:
        static.step(grown_action(0, static))
    pairs = [
        (a["learning_rate"], b["learning_rate"])
        for a, b in zip(grown.curve, static.curve, strict=True)
        if a["budget_fraction"] >= spec.optimizer.warmup
    ]
    assert pairs
    for theirs, ours in pairs:
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert pairs[0][0] > 1.1 * pairs[5][0]  # the graft has lowered it


def test_cooldowns_are_added_where_there_are_none(tiny_spec):
    assert with_cooldowns(tiny_spec).budget.cooldowns == COOLDOWNS
    own = tiny_spec.overridden({"budget.cooldowns": [0.5]})
    assert with_cooldowns(own) == own


def test_a_point_is_told_by_its_values(tiny_spec):
    assert Point(0, {"b": 1, "a": 2}, tiny_spec).grid == '{"a": 2, "b": 1}'
