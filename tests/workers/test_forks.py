"""What is done on copies of a run: cooldowns cost it nothing, probes what they used, contributions a small share."""

import dataclasses
import math

import pytest
import torch

from esper.platform.contracts import GraftAction
from esper.workers.probe import ChargedProbe
from esper.workers.run import CONTRIBUTION_SHARE, GrowthRun


@pytest.fixture
def spec(tiny_spec):
    return tiny_spec.model_copy(update={"budget": tiny_spec.budget.model_copy(update={"amount": 400})})


def graft(run, blueprint):
    return next(i for i, a in enumerate(run.telemetry.actions) if (a.operation, a.blueprint) == ("graft", blueprint))


def play(run, plan=()):
    while not run.ended:
        name = dict(plan).get(run.telemetry.sequence)
        run.step(GraftAction(graft(run, name) if name else 0, run.telemetry.sequence))
    return run.summary()


def test_cooldowns_tell_annealed_losses_and_change_nothing(spec, tokens):
    plain = GrowthRun(spec, tokens)
    plain.reset(seed=0)
    before = play(plain, {1: "ffn"}.items())
    cooled = GrowthRun(
        spec.model_copy(update={"budget": spec.budget.model_copy(update={"cooldowns": (0.3, 0.6)})}), tokens
    )
    cooled.reset(seed=0)
    after = play(cooled, {1: "ffn"}.items())
    points = after.pop("annealed")
    assert before.pop("annealed") == []
    measured = ("wall_seconds", "validation_seconds", "val_curve")
    assert {k: v for k, v in before.items() if k not in measured} == {
        k: v for k, v in after.items() if k not in measured
    }
    assert [point["val_loss"] for point in before["val_curve"]] == [point["val_loss"] for point in after["val_curve"]]
    # Taken at the first decision past 0.3·0.8 and 0.6·0.8 (at 2/8 and 4/8), each decays for as long as the run will.
    assert [point["budget_fraction"] for point in points] == pytest.approx([0.25 / 0.8, 0.5 / 0.8], abs=0.005)
    assert [point["steps"] for point in points] == pytest.approx([125, 250], abs=2)
    curve = {point["steps"]: point["val_loss"] for point in after["val_curve"]}
    assert points[1]["val_loss"] < curve[250]  # annealing helps
    assert points[1]["val_loss"] > curve[400]


def test_a_cooldown_is_the_run_of_the_smaller_budget(spec, tokens):
    """Warm-up apart: without one, a run of that budget ends at the very same loss."""
    optimizer = spec.optimizer.model_copy(update={"warmup": 0.0})
    spec = spec.model_copy(update={"optimizer": optimizer})
    run = GrowthRun(spec, tokens)
    run.reset(seed=0)
    for _ in range(4):
        run.step(GraftAction(0, run.telemetry.sequence))
    annealed = run.cooldown()
    small = GrowthRun(spec.model_copy(update={"budget": spec.budget.model_copy(update={"amount": 250})}), tokens)
    small.reset(seed=0)
    play(small)
    assert annealed["steps"] == small.ledger.steps == 250
    assert annealed["val_loss"] == pytest.approx(small.loss, abs=1e-6)


def test_a_cooldown_that_goes_wrong_has_no_loss(spec, tokens):
    run = GrowthRun(spec, tokens)
    run.reset(seed=0)
    run.step(GraftAction(0, 0))
    with torch.no_grad():
        run.trainer.host.ln_f.weight.fill_(math.nan)
    assert run.cooldown()["val_loss"] is None


def test_a_probe_is_charged_on_every_axis_and_leaves_the_run_alone(spec, tokens):
    run = GrowthRun(spec, tokens)
    run.reset(seed=0)
    run.step(GraftAction(0, 0))
    ledger, steps = dataclasses.replace(run.ledger), run.trainer.steps
    weights = {name: tensor.clone() for name, tensor in run.trainer.host.state_dict().items()}
    actions = [GraftAction(i, 1) for i in (0, graft(run, "block"))]
    losses = ChargedProbe(run).twins(actions, 20)
    assert losses.shape == (2, 20)
    assert run.trainer.steps == steps
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.trainer.host.state_dict().items())
    used = run.ledger.less(ledger)
    assert used.steps == 40
    assert used.tokens == 40 * run.tokens_per_step
    apart = [GrowthRun(spec, tokens) for _ in actions]
    seconds = 0.0
    for other, action in zip(apart, actions, strict=True):
        other.reset(seed=0)
        other.step(GraftAction(0, 0))
        start = dataclasses.replace(other.ledger)
        other._change(other.telemetry.actions[action.index])
        for _ in range(20):
            other._optimizer_step()
        seconds += other.ledger.less(start).seconds
    assert used.seconds == pytest.approx(seconds)


def test_contributions_are_measured_charged_and_true(spec, tokens):
    budget = spec.budget.model_copy(update={"amount": 2400})
    growth = spec.growth.model_copy(update={"probation_steps": 30})
    spec = spec.model_copy(update={"budget": budget, "growth": growth})
    run = GrowthRun(spec, tokens)
    run.reset(seed=0)
    run.step(GraftAction(graft(run, "ffn"), 0))
    run.step(GraftAction(graft(run, "block"), 1))
    run.step(GraftAction(0, 2))
    told = dict(zip(run.telemetry.site_ids, run.telemetry.site_column("contribution"), strict=True))
    flags = dict(zip(run.telemetry.site_ids, run.telemetry.site_column("contribution_measured"), strict=True))
    assert {site for site, flag in flags.items() if flag} == {seed.site for seed in run.trainer.kasmina.seeds}
    layer = run.trainer.kasmina.seeds[-1].site
    whole = run.trainer._mean_loss(*run.trainer._sample, lambda: None)
    fork = run.fork()
    fork.trainer.kasmina.prune(layer)
    assert told[layer] == pytest.approx(fork.trainer._mean_loss(*fork.trainer._sample, lambda: None) - whole, abs=1e-6)
    assert told[layer] != 0
    # Charged in seconds, not in optimizer steps: a run without seeds uses less.
    spent = run.ledger.seconds
    expected = sum(
        (point["steps"] - before["steps"]) * spec.clock.step_seconds(run._shape(), run.tokens_per_step)
        for before, point in zip(run.curve[:-1], run.curve[1:], strict=True)
    )
    assert spent < expected * (1 + CONTRIBUTION_SHARE)  # at the final, largest size
    assert math.isfinite(told[layer])
