"""A sweep's trials: their names, their costs, and the specs that they run under."""

import pytest

from esper.pipelines.sweeps.arms import Arm
from esper.pipelines.sweeps.plan import Point
from esper.pipelines.sweeps.trials import (
    Trial,
    born,
    lrpath_spec,
    size_parameters,
    with_rates,
)
from esper.platform.contracts import GraftAction
from esper.workers.run import GrowthRun
from esper.workers.tolaria.rate import rate


def played(spec, tokens, *grafts: int) -> GrowthRun:
    """A run that grafts the last candidate at these decisions."""
    run = GrowthRun(spec, tokens)
    run.reset(seed=0)
    while not run.ended:
        number = run.telemetry.sequence
        run.step(GraftAction(run.telemetry.legal()[-1] if number in grafts else 0, number))
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
    spec = with_rates(born(tiny_spec, 5), {5: 0.02, 1: 0.03})
    assert (spec.host.n_layer, spec.growth.max_layers) == (5, 5)
    assert rate(spec.optimizer, 0.5, size_parameters(tiny_spec, 5)) == 0.02
    assert rate(spec.optimizer, 0.5, size_parameters(tiny_spec, 1)) == 0.03


def test_a_static_size_under_another_runs_rate(tiny_spec, tokens):
    rates = {"optimizer.rate_exponent": 0.5, "optimizer.rate_parameters": 3000, "growth.probation_steps": 8}
    spec = tiny_spec.overridden(rates)
    grown = played(spec, tokens, 2)
    followed = lrpath_spec(spec, 1, grown.summary()["val_curve"])
    assert followed.host.n_layer == 1
    static = played(followed, tokens)
    ours, theirs = (
        [point["learning_rate"] for point in run.curve if point["budget_fraction"] >= spec.optimizer.warmup]
        for run in (static, grown)
    )
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert theirs[0] > 1.1 * theirs[5]  # the graft has lowered it
