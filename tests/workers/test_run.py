"""A training run on real tensors: deterministic, paired by seed, safe at a graft, honest about what it measures."""

import math
import sys

import pytest
import torch

from esper.platform.errors import UserError
from esper.workers.calibrate import calibrate
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data.prepared import evenly
from tests.workers.growing_run import act, begun, changed, outcome, play, same_telemetry

PLAN = {1: "ffn", 3: "block", 4: "attention"}


def played(spec, tokens, plan, seed=0):
    run = begun(spec, tokens, seed=seed)
    return run, play(run, plan)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_same_seed_same_numbers_and_a_graft_changes_no_other_random_stream(tiny_spec, tokens, dropout):
    spec = changed(tiny_spec, host={"dropout": dropout})
    first, seen = played(spec, tokens, PLAN)
    torch.manual_seed(1234)  # dropout is a stream of its own
    again, seen_again = played(spec, tokens, PLAN)
    assert outcome(first) == outcome(again)
    assert all(same_telemetry(a, b) for a, b in zip(seen, seen_again, strict=True))
    assert played(spec, tokens, PLAN, seed=1)[0].loss != first.loss
    static, _ = played(spec, tokens, {})
    for step in (0, 7, 39):
        batches = zip(first.trainer.batches.at(step), static.trainer.batches.at(step), strict=True)
        assert all(torch.equal(a, b) for a, b in batches)
    assert first.curve[1]["val_loss"] == static.curve[1]["val_loss"]
    assert first.loss != static.loss


def test_it_trains_and_goes_on_without_a_compiler_whose_import_takes_a_second(small_spec, data, grafts, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # to import it raises
    run, _ = played(small_spec, data, {1: grafts["width"], 3: grafts["layer"]})
    restored = GrowthRun(small_spec, data)
    restored.load(*run.state())
    assert restored.loss == run.loss


def test_it_learns_and_grows(tiny_spec, tokens):
    spec = changed(tiny_spec, budget={"amount": 200}, optimizer={"learning_rate": 1e-2})
    run, seen = played(spec, tokens, PLAN)
    summary = run.summary()
    first = summary["val_curve"][0]["val_loss"]
    assert summary["val_loss"] < first - 0.5
    assert first == pytest.approx(math.log(tokens.manifest.vocab_size), abs=0.2)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert [graft["blueprint"] for graft in summary["grafts"]] == ["ffn", "block", "attention"]
    for graft in summary["grafts"]:
        assert graft["val_loss_after"] == graft["val_loss_before"]
        assert graft["identity"] < 1e-5
        assert graft["parameters_after"] > graft["parameters_before"]
    assert summary["parameters"] == sum(p.numel() for p in run.trainer.host.parameters())
    assert all(telemetry.problems(run.space) is None for telemetry in seen)
    names = ("slopes_measured", "gradient_noise_measured", "train_gap_measured")
    assert [[t.get(n) for n in names] for t in (seen[0], seen[1])] == [[0, 0, 0], [1, 1, 1]]
    assert seen[1].site_column("norms_measured").all()
    assert not seen[1].site_column("contribution_measured").any()


def test_a_graft_that_moves_a_logit_is_evaluated(tiny_spec, tokens, monkeypatch):
    proved, evaluated = (begun(tiny_spec, tokens, None) for _ in range(2))
    heads = type(evaluated.blueprints["attention"])
    graft = heads.graft

    def harmful(blueprint, host, site, *args, **kwargs):
        with torch.no_grad():
            host.ln_f.weight.mul_(1.5)
        return graft(blueprint, host, site, *args, **kwargs)

    act(proved, "attention")
    monkeypatch.setattr(heads, "graft", harmful)
    act(evaluated, "attention")
    (sound,), (spiked,) = proved.grafts, evaluated.grafts
    assert (sound.val_loss_after, sound.val_loss_before) == (spiked.val_loss_before,) * 2
    assert spiked.identity is None
    assert spiked.val_loss_after != pytest.approx(spiked.val_loss_before, abs=1e-3)


def test_decisions_see_a_part_of_the_held_out_set_and_the_end_all_of_it(tiny_spec, tokens):
    assert evenly(4, 10).tolist() == [0, 2, 5, 7]
    assert evenly(10, 4).tolist() == [0, 1, 2, 3]
    run, whole, seen = begun(tiny_spec, tokens), changed(tiny_spec, data={"decision_tokens": 512}), []
    run.on_step = lambda run: seen.append(run.trainer.evaluate()) if run.trainer.unread == 5 else None
    play(run)
    losses = [point["val_loss"] for point in run.curve]
    assert set(losses[1:-1]) < set(seen)
    assert losses[-1] == run.loss == run.trainer.evaluate(whole=True) == played(whole, tokens, {})[0].loss
    assert losses[-1] != run.trainer.evaluate()


def test_every_graft_ends_with_an_outcome(tiny_spec, tokens):
    """Seeds that are not their site's newest too, those inside a layer that is pruned, and those of the last slices."""
    run = begun(changed(tiny_spec, growth={"probation_steps": 12}, budget={"amount": 60}), tokens)
    for action in (("ffn", "h0.ffn"), ("ffn", "h0.ffn"), ("block", "h0.stream"), ("ffn", "h1.ffn")):
        act(run, *action)
    act(run, "block", "h0.stream", "prune")
    act(run, "attention")
    play(run)
    outcomes = [graft["outcome"] for graft in run.summary()["grafts"]]
    assert outcomes == ["kept", "kept", "pruned", "pruned", "kept"]
    last, _ = played(changed(tiny_spec, growth={"probation_steps": 30}), tokens, {3: "ffn"})
    assert [graft["outcome"] for graft in last.summary()["grafts"]] == ["on probation"]


@pytest.mark.parametrize("axis", ["parameter_seconds", "tokens", "seconds", "flops"])
def test_a_budget_on_any_axis_is_kept(tiny_spec, tokens, axis):
    whole, _ = played(tiny_spec, tokens, {})
    amount = whole.ledger.read(axis)
    spec = changed(tiny_spec, budget={"axis": axis, "amount": amount}, growth={"min_optimizer_steps": 1})
    (run, _), (grown, _) = (played(spec, tokens, plan) for plan in ({}, PLAN))
    assert run.ledger.steps == pytest.approx(whole.ledger.steps, abs=1)
    assert axis == "tokens" or grown.ledger.steps < run.ledger.steps
    assert amount <= grown.ledger.read(axis) * (1 + 1e-9)
    assert grown.ledger.read(axis) < amount * 1.2  # one step of overshoot


@pytest.mark.parametrize("axis", ["parameter_seconds", "tokens", "steps"])
def test_a_budget_of_less_than_a_step_is_refused(tiny_spec, tokens, axis):
    with pytest.raises(UserError, match=rf"the budget is 0.9 {axis}, and one optimizer step uses .*: set a larger"):
        begun(changed(tiny_spec, budget={"axis": axis, "amount": 0.9}), tokens)
    begun(changed(tiny_spec, budget={"axis": "steps", "amount": 1}), tokens)


def test_a_clock_is_fitted_to_this_device(small_spec, data):
    clock, rows = calibrate(small_spec, data, steps=6)
    shapes, width = {(row["layers"], row["width"]) for row in rows}, small_spec.host.own_width
    assert shapes == {(n, factor * width) for n in (1, 2, 3) for factor in (1, 2)}
    for row in rows:
        formula = clock.base_seconds + clock.layer_seconds * row["layers"] + row["flops"] / clock.flops_per_second
        assert row["predicted"] == pytest.approx(formula)
        assert abs(row["error"]) < 3
    assert clock.graft_seconds > 0


def test_a_wall_clock_charges_what_was_measured(tiny_spec, tokens):
    run, _ = played(changed(tiny_spec, clock={"kind": "wall"}), tokens, PLAN)
    assert run.ledger.seconds == run.ledger.wall_seconds
    assert run.ledger.validation_seconds > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_in_bfloat16(tiny_spec, tokens):
    spec = changed(tiny_spec, clock={"kind": "wall"}).model_copy(update={"device": "cuda", "dtype": "bfloat16"})
    run, _ = played(spec, tokens, PLAN)
    for graft in run.grafts:
        assert graft.val_loss_after == pytest.approx(graft.val_loss_before, abs=1e-3)
