"""A sweep's trials: their names, their costs, and the specs that they run under."""

import json

import pytest

from esper.pipelines.sweeps.arms import Arm
from esper.pipelines.sweeps.plan import Point
from esper.pipelines.sweeps.trials import (
    COOLDOWNS,
    Trial,
    cost,
    final_spec,
    lrpath_spec,
    size_parameters,
    static_spec,
    with_cooldowns,
    with_rates,
)
from esper.platform.contracts import GraftAction
from esper.platform.ledger import AXES
from esper.workers.run import GrowthRun
from esper.workers.tolaria.rate import rate


def played(spec, tokens, grafts=(), seed: int = 0) -> GrowthRun:
    """A run that grafts these blueprints, one a decision from the second on."""
    run, left = GrowthRun(spec, tokens), list(grafts)
    run.reset(seed=seed)
    while not run.ended:
        rows = [i for i in run.telemetry.legal() if left and run.telemetry.actions[i].blueprint == left[0]]
        if run.telemetry.sequence >= 2 and rows:
            left.pop(0)
            run.step(GraftAction(rows[-1], run.telemetry.sequence))
        else:
            run.step(GraftAction(0, run.telemetry.sequence))
    assert len(run.grafts) == len(grafts)
    return run


def test_names_tell_trials_apart(tiny_spec):
    arm = Arm(name="random", of="tamiyo")
    trials = [
        Trial(arm, purpose, seed, Point(index, {}, tiny_spec, several=True), tiny_spec, note=note)
        for purpose, note in (("test", ""), ("rates", "rate0.1"), ("rates", "rate0.2"))
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len({trial.name for trial in trials}) == len(trials)
    assert trials[1].name == "random.of.tamiyo-seed0-point1"
    assert trials[1].tags()["label"] == "random:tamiyo"


def test_a_static_size_may_be_larger_than_growing_may_get_and_has_its_own_rate(tiny_spec):
    spec = with_rates(static_spec(tiny_spec, 5), {5: 0.02, 1: 0.03})
    assert (spec.host.n_layer, spec.growth.max_layers) == (5, 5)
    assert rate(spec.optimizer, 0.5, size_parameters(tiny_spec, 5)) == 0.02
    assert rate(spec.optimizer, 0.5, size_parameters(tiny_spec, 1)) == 0.03


def test_a_run_is_born_in_the_shape_that_another_ended_with(tiny_spec, tokens):
    grown = played(tiny_spec, tokens, ("block", "ffn", "attention"), seed=3)
    ended = grown.summary()
    born = GrowthRun(final_spec(tiny_spec, json.loads(json.dumps(ended["shape"]))), tokens)
    born.reset(seed=3)
    assert born.layout.parameters == ended["parameters"]
    assert born.summary()["shape"] == ended["shape"]
    assert born.trainer.host.shape.flops_per_token() == grown.trainer.host.shape.flops_per_token()


def test_a_static_size_under_another_runs_rate(tiny_spec, tokens):
    rates = {"optimizer.rate_exponent": 0.5, "optimizer.rate_parameters": 3000, "growth.probation_steps": 8}
    spec = tiny_spec.overridden(rates)
    grown = played(spec, tokens, ["block"])
    followed = lrpath_spec(spec, 1, grown.summary()["val_curve"])
    assert followed.host.n_layer == 1
    static = played(followed, tokens)
    ours, theirs = (
        [point["learning_rate"] for point in run.curve if point["budget_fraction"] >= spec.optimizer.warmup]
        for run in (static, grown)
    )
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert theirs[0] > 1.1 * theirs[5]  # the graft has lowered it


def test_cooldowns_are_added_where_there_are_none_and_their_forks_cost(tiny_spec, tokens):
    spec = with_cooldowns(tiny_spec)
    assert spec.budget.cooldowns == COOLDOWNS
    own = tiny_spec.overridden({"budget.cooldowns": [0.5]})
    assert with_cooldowns(own) == own
    alone, with_forks = played(tiny_spec, tokens).summary(), played(spec, tokens).summary()
    assert cost(tiny_spec, alone) == {axis: alone[axis] for axis in AXES}
    # Forks begin at the decisions of steps 10 and 20, and decay to 10 / 0.8 and 20 / 0.8.
    assert cost(spec, with_forks)["steps"] == 40 + (13 - 10) + (25 - 20)
