"""A training run on real tensors: deterministic, paired by seed, safe at a graft, honest about what it measures."""

import math

import numpy as np
import pytest
import torch

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.telemetry import GLOBALS
from esper.workers.run import GrowthRun


def row(telemetry, blueprint, site=None):
    """The candidate that grafts a blueprint, at a site or at the first that takes it."""
    return next(i for i, a in enumerate(telemetry.actions) if a.blueprint == blueprint and site in (None, a.site))


def play(spec, tokens, plan, seed=0):
    """An episode that grafts `plan[decision]` and otherwise waits; returns (run, telemetries)."""
    run = GrowthRun(spec, tokens)
    seen = [run.reset(seed=seed)]
    while True:
        telemetry = seen[-1]
        blueprint = plan.get(telemetry.sequence)
        index = row(telemetry, blueprint) if blueprint else 0
        transition = run.step(GraftAction(index, telemetry.sequence))
        seen.append(transition.telemetry)
        if transition.terminated:
            return run, seen


PLAN = {1: "ffn", 3: "block", 4: "attention"}


def without_wall(summary):
    wall = ("wall_seconds", "validation_seconds")
    return {
        k: [{a: b for a, b in point.items() if a not in wall} for point in v] if k == "val_curve" else v
        for k, v in summary.items()
        if k not in wall
    }


def test_same_seed_same_numbers(tiny_spec, tokens):
    first, seen = play(tiny_spec, tokens, PLAN)
    again, seen_again = play(tiny_spec, tokens, PLAN)
    assert without_wall(first.summary()) == without_wall(again.summary())
    for a, b in zip(seen, seen_again, strict=True):
        assert all(np.array_equal(a.arrays()[name], b.arrays()[name]) for name in a.arrays())
    other, _ = play(tiny_spec, tokens, PLAN, seed=1)
    assert other.summary()["val_loss"] != first.summary()["val_loss"]


def test_it_learns_and_grows(tiny_spec, tokens):
    spec = tiny_spec.model_copy(
        update={
            "budget": tiny_spec.budget.model_copy(update={"amount": 200}),
            "optimizer": tiny_spec.optimizer.model_copy(update={"learning_rate": 1e-2}),
        }
    )
    run, seen = play(spec, tokens, PLAN)
    summary = run.summary()
    assert summary["val_loss"] < summary["val_curve"][0]["val_loss"] - 0.5
    assert summary["val_curve"][0]["val_loss"] == pytest.approx(math.log(tokens.manifest.vocab_size), abs=0.2)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert [graft["blueprint"] for graft in summary["grafts"]] == ["ffn", "block", "attention"]
    for graft in summary["grafts"]:
        assert graft["val_loss_after"] == pytest.approx(graft["val_loss_before"], abs=1e-5)
        assert graft["parameters_after"] > graft["parameters_before"]
    assert summary["parameters"] == sum(p.numel() for p in run.trainer.host.parameters())
    assert all(telemetry.problems(run.space) is None for telemetry in seen)
    names = ("slopes_measured", "gradient_noise_measured")
    assert [[t.get(n) for n in names] for t in (seen[0], seen[1])] == [[0, 0], [1, 1]]
    assert seen[1].site_column("norms_measured").all()
    assert not seen[1].site_column("contribution_measured").any()


def test_the_stage_of_a_seed_is_told(tiny_spec, tokens):
    growth = tiny_spec.growth.model_copy(update={"probation_steps": 12})
    _, seen = play(tiny_spec.model_copy(update={"growth": growth}), tokens, {1: "ffn"})
    site = seen[0].site_ids.index("h0.ffn")
    stages = [(t.site_column("on_probation")[site], t.site_column("established")[site]) for t in seen]
    assert stages[:2] == [(0, 0), (0, 0)]
    assert stages[2:4] == [(1, 0), (1, 0)]  # 5 and 10 steps old
    assert stages[4:] == [(0, 1)] * (len(stages) - 4)


def test_a_graft_changes_no_other_random_stream(tiny_spec, tokens):
    grown, _ = play(tiny_spec, tokens, PLAN)
    static, _ = play(tiny_spec, tokens, {})
    for step in (0, 7, 39):
        assert all(
            torch.equal(a, b)
            for a, b in zip(grown.trainer.batches.at(step), static.trainer.batches.at(step), strict=True)
        )
    assert grown.curve[1]["val_loss"] == static.curve[1]["val_loss"]
    assert grown.curve[-1]["val_loss"] != static.curve[-1]["val_loss"]


def test_a_fork_is_independent_and_exact(tiny_spec, tokens):
    run = GrowthRun(tiny_spec, tokens)
    telemetry = run.reset(seed=0)
    telemetry = run.step(GraftAction(row(telemetry, "ffn"), 0)).telemetry
    fork = run.fork()
    weights = {name: tensor.clone() for name, tensor in run.trainer.host.state_dict().items()}
    on_fork = fork.step(GraftAction(row(telemetry, "block"), 1))
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.trainer.host.state_dict().items())
    on_run = run.step(GraftAction(row(telemetry, "block"), 1))
    assert on_fork.reward == on_run.reward
    assert fork.loss == run.loss


def test_twins_see_the_same_batches_and_a_graft_does_not_spike(tiny_spec, tokens):
    run = GrowthRun(tiny_spec, tokens)
    telemetry = run.reset(seed=0)
    for decision in range(3):
        telemetry = run.step(GraftAction(0, decision)).telemetry
    grafts = [i for i in telemetry.legal() if i]
    losses, ledgers = run.twins([GraftAction(int(i), 3) for i in [0, 0, *grafts]], 10)
    assert {ledger.steps for ledger in ledgers} == {25}
    assert np.array_equal(losses[0], losses[1])
    assert losses[2:, 0] == pytest.approx(losses[0, 0], abs=1e-5)
    assert not np.array_equal(losses[2], losses[0])
    assert (losses[2:] - losses[0]).max() < 0.05  # a fast rate on a toy; real text is checked in test_real_text.py


@pytest.mark.parametrize("axis", ["parameter_seconds", "tokens", "seconds", "flops"])
def test_a_budget_on_any_axis_is_kept(tiny_spec, tokens, axis):
    whole, _ = play(tiny_spec, tokens, {})
    amount = whole.ledger.read(axis)
    budget = tiny_spec.budget.model_copy(update={"axis": axis, "amount": amount})
    run, _ = play(tiny_spec.model_copy(update={"budget": budget}), tokens, {})
    assert run.ledger.steps == pytest.approx(whole.ledger.steps, abs=1)
    growth = tiny_spec.growth.model_copy(update={"min_optimizer_steps": 1})
    grown, _ = play(tiny_spec.model_copy(update={"budget": budget, "growth": growth}), tokens, PLAN)
    if axis != "tokens":
        assert grown.ledger.steps < run.ledger.steps
    assert amount <= grown.ledger.read(axis) * (1 + 1e-9)
    assert grown.ledger.read(axis) < amount * 1.2  # one step of overshoot


def test_a_wall_clock_charges_what_was_measured(tiny_spec, tokens):
    clock = tiny_spec.clock.model_copy(update={"kind": "wall"})
    run, _ = play(tiny_spec.model_copy(update={"clock": clock}), tokens, PLAN)
    assert run.ledger.seconds == run.ledger.wall_seconds
    assert run.ledger.validation_seconds > 0


def test_instances(tiny_spec, tokens):
    run = GrowthRun(tiny_spec, tokens)
    telemetry = run.reset(Instance(n_layer=2, data=(0.5, 1.0)), seed=0)
    assert run.trainer.host.shape.depth() == 2
    assert telemetry.globals[GLOBALS.index("size_vs_start")] == 0
    low = 0.5 * tokens.split("train").tokens
    assert run.trainer.batches.low == int(low)


def test_a_text_shorter_than_the_context_is_refused(tiny_spec, tokens):
    host = tiny_spec.host.model_copy(update={"block_size": 10**6})
    with pytest.raises(UserError, match=r"too few for a context of 1000000"):
        GrowthRun(tiny_spec.model_copy(update={"host": host}), tokens).reset()


def test_dropout_is_a_stream_of_its_own(tiny_spec, tokens):
    host = tiny_spec.host.model_copy(update={"dropout": 0.2})
    spec = tiny_spec.model_copy(update={"host": host})
    first, _ = play(spec, tokens, PLAN)
    torch.manual_seed(1234)
    again, _ = play(spec, tokens, PLAN)
    assert first.loss == again.loss


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16(tiny_spec, tokens):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    clock = tiny_spec.clock.model_copy(update={"kind": "wall"})
    run, _ = play(tiny_spec.model_copy(update={"device": "cuda", "dtype": "bfloat16", "clock": clock}), tokens, PLAN)
    for graft in run.summary()["grafts"]:
        assert graft["val_loss_after"] == pytest.approx(graft["val_loss_before"], abs=1e-3)


def test_a_gpu_that_is_not_there_is_refused(tiny_spec, tokens):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="device is 'cuda'"):
        GrowthRun(tiny_spec.model_copy(update={"device": "cuda"}), tokens).reset()
