"""What is done on copies of a run: cooldowns cost it nothing, probes what they used, contributions a small share."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from esper.platform.contracts import GraftAction
from esper.platform.ledger import AXES
from esper.workers.run import CONTRIBUTION_SHARE
from esper.workers.tolaria.trainer import EVAL_POSITIONS_AT_ONCE
from tests.workers.growing_run import act, begun, changed, outcome, play, row


@pytest.fixture
def spec(tiny_spec):
    return changed(tiny_spec, budget={"amount": 400})


def rows(run, *blueprints):
    """An action for WAIT, and one for each blueprint's first graft."""
    return [GraftAction(row(run, name), run.sequence) for name in (None, *blueprints)]


def test_twins_see_the_same_batches_and_a_graft_does_not_spike(small_spec, data):
    run = begun(small_spec, data, None, None, None)
    grafts = [GraftAction(int(i), 3) for i in run.telemetry.legal() if i]
    losses = run.twins([*rows(run), *rows(run), *grafts], 10)
    assert np.array_equal(losses[0], losses[1])
    assert losses[2:, 0] == pytest.approx(losses[0, 0], abs=1e-5)
    assert not np.array_equal(losses[2], losses[0])
    assert (losses[2:] - losses[0]).max() < 0.05  # a fast rate on a toy; real text is checked in test_real_text.py


def test_cooldowns_tell_annealed_losses_and_change_nothing(small_spec, data, grafts):
    spec = changed(small_spec, budget={"amount": 400})
    plain, cooled = (begun(changed(spec, budget={"cooldowns": at}), data) for at in ((), (0.3, 0.6)))
    play(plain, {1: grafts["width"]})
    play(cooled, {1: grafts["width"]})
    before, after = outcome(plain), outcome(cooled)
    points = after.pop("annealed")
    assert before.pop("annealed") == []
    assert before == after
    # Taken at the first decision past 0.3·0.8 and 0.6·0.8 (at 2/8 and 4/8), each decays for as long as the run will.
    assert [point["budget_fraction"] for point in points] == pytest.approx([0.25 / 0.8, 0.5 / 0.8], abs=0.005)
    assert [point["steps"] for point in points] == pytest.approx([125, 250], abs=2)
    curve = {point["steps"]: point["val_loss"] for point in after["val_curve"]}
    assert curve[400] < points[1]["val_loss"] < curve[250]  # annealing helps


def test_a_cooldown_is_the_run_of_the_smaller_budget(spec, tokens):
    """Warm-up apart: without one, a run of that budget ends at the very same loss."""
    spec = changed(spec, optimizer={"warmup": 0.0})
    annealed = begun(spec, tokens, None, None, None, None).cooldown()
    small = begun(changed(spec, budget={"amount": 250}), tokens)
    play(small)
    assert annealed["steps"] == small.ledger.steps == 250
    assert annealed["val_loss"] == pytest.approx(small.loss, abs=1e-6)


def test_a_cooldown_that_goes_wrong_has_no_loss(spec, tokens):
    run = begun(spec, tokens, None)
    with torch.no_grad():
        run.trainer.host.ln_f.weight.fill_(math.nan)
    assert run.cooldown()["val_loss"] is None


def test_a_run_hears_of_a_stop_within_its_copies_and_evaluations(spec, tokens, monkeypatch):
    """At each optimizer step of a copy, and at each part of an evaluation: of the run, not of the copy."""
    run = begun(spec, tokens, "ffn", None)
    heard = []
    run.on_step = heard.append

    def calls(work):
        heard.clear()
        work()
        assert {id(heard_of) for heard_of in heard} == {id(run)}
        return len(heard)

    assert calls(lambda: run.fork().twins(rows(run, "block"), 20)) == 40
    assert calls(run.cooldown) == 25 + 1  # steps from 100 to 125, and the evaluation
    monkeypatch.setitem(EVAL_POSITIONS_AT_ONCE, "cpu", 64)
    assert calls(run._evaluate) == 256 / 64
    assert calls(lambda: run._evaluate(whole=True)) == 512 / 64
    assert calls(lambda: run.trainer.contributions(["h0.ffn"], run._pause)) == 2 * run.trainer.sample_tokens / 64


def test_a_probe_is_charged_on_every_axis_and_in_the_rent_and_leaves_the_run_alone(spec, tokens):
    run = begun(changed(spec, budget={"axis": "tokens", "amount": 25600}), tokens)
    first, rewards = run.loss, [act(run).reward]
    ledger, expected, before = (dataclasses.replace(run.ledger) for _ in range(3))
    actions, (values, tensors) = rows(run, "block"), run.trainer.state()  # weights, moments, steps; a copy
    for action in actions:
        alone = run.fork()
        alone.twins([action], 20)
        expected.add(alone.ledger.less(before))
    assert run.twins(actions, 20).shape == (2, 20)
    assert run.trainer.state()[0] == values
    torch.testing.assert_close(run.trainer.state()[1], tensors, rtol=0, atol=0)
    used = run.ledger.less(ledger)
    assert (used.steps, used.tokens) == (40, 40 * run.tokens_per_step)
    assert {axis: run.ledger.read(axis) for axis in AXES} == pytest.approx({axis: expected.read(axis) for axis in AXES})
    while not run.ended:
        rewards.append(act(run).reward)
    rent = run.spec.reward.rent * run.ledger.parameter_seconds / run.reference
    assert sum(rewards) == pytest.approx(first - run.trainer.evaluate() - rent, abs=1e-9)  # on one held-out set


def test_contributions_are_measured_charged_and_true(spec, tokens):
    spec = changed(spec, budget={"amount": 2400}, growth={"probation_steps": 30})
    run = begun(spec, tokens, "ffn", "block", None)
    columns = [run.telemetry.site_column(name) for name in ("contribution", "contribution_measured")]
    told = {site: value for site, value, flag in zip(run.telemetry.site_ids, *columns, strict=True) if flag}
    assert told.keys() == {seed.site for seed in run.trainer.kasmina.seeds}
    layer, fork = run.trainer.kasmina.seeds[-1].site, run.fork()
    fork.trainer.kasmina.prune(layer)
    whole, without = (each.trainer._mean_loss(*each.trainer._sample, lambda: None)[0] for each in (run, fork))
    assert told[layer] == pytest.approx(without - whole, abs=1e-6)
    assert told[layer] != 0
    # Charged in seconds, not in optimizer steps: a run without seeds uses less.
    expected = run.ledger.steps * spec.clock.step_seconds(run.shape, run.tokens_per_step)
    assert run.ledger.seconds < expected * (1 + CONTRIBUTION_SHARE)  # at the final, largest size
