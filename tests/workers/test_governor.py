"""The governor sees faults and nothing else, and a run survives them without the graft that may have caused them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.telemetry import SITE
from esper.workers.kasmina.governor import CHECK_EVERY, WINDOW, fault
from esper.workers.run import GrowthRun
from tests.workers.growing_run import act, begun, changed, row, same_weights, weights


def rows(losses):
    return [[float(loss), 1.0, 1.0] for loss in losses]


@given(st.integers(0, 10**6), st.floats(0.01, 0.3), st.floats(0, 2))
def test_noise_and_progress_are_no_fault(seed, noise, progress):
    random, window = np.random.default_rng(seed), []
    losses = 1.5 + progress * np.exp(-np.arange(600) / 200) + noise * random.standard_normal(600)
    losses[random.integers(0, 600, 12)] += 6 * noise  # single bad batches
    assert all(fault(rows(losses[i : i + CHECK_EVERY]), window, 100) is None for i in range(0, 600, CHECK_EVERY))


@pytest.mark.parametrize(
    ("before", "spread", "after", "sentence"),
    [
        (1.5, 0.003, [[1.5, 1.0, 1.0], [math.nan, 1.0, 1.0]], "the loss was not finite"),
        (1.5, 0.003, [[1.5, 2.0, 2.0], [1.5, 2.0, math.inf]], "a gradient was not finite"),
        (1.5, 0.003, [[3.0, 1.0, 1.0]] * CHECK_EVERY, "the loss rose from 1.50 to 3.00"),
        (2.4, 0.3, [[math.log(20), 1.0, 1.0]] * CHECK_EVERY, "chance level"),  # however noisy it was
    ],
)
def test_faults(before, spread, after, sentence):
    window = []
    fault(rows(before + spread * np.random.default_rng(0).standard_normal(WINDOW)), window, 20)
    assert sentence in fault(after, window, 20)


@pytest.fixture
def spec(tiny_spec):
    """240 steps in 8 decisions, a seed's probation longer than a decision."""
    return changed(tiny_spec, budget={"amount": 240}, growth={"probation_steps": 50, "lockout_decisions": 2})


def started(spec, tokens, inject=None):
    """A run that has waited for two decisions; `inject(run)` is called after every step from now on."""
    run = begun(spec, tokens, None, None)
    run.on_step = inject
    return run


def poison(parameter):
    with torch.no_grad():
        parameter.fill_(math.nan)


def seed_weight(run):
    return run.trainer.kasmina.slowed()[0][0].parameter  # the newest seed first


FAULTS = {
    "weight": lambda run: poison(seed_weight(run)),
    "gradient": lambda run: seed_weight(run).register_hook(lambda grad: grad * math.nan),
    "rate": lambda run: run.trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: [group.update(lr=group["lr"] * 1000) for group in optimizer.param_groups] and None
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_the_graft_is_survived_without_it(spec, tokens, kind):
    def inject(run):
        if run.trainer.kasmina.seeds and run.trainer.kasmina.seeds[-1].age == 10:
            FAULTS[kind](run)

    run = started(spec, tokens, inject)
    shape, steps = run.trainer.host.shape, run.trainer.steps
    transition = act(run, "ffn")
    assert not transition.terminated
    (rollback,) = run.rollbacks
    assert rollback.removed == "ffn at h0.ffn"
    assert run.grafts[-1].outcome == "rolled back"
    assert run.trainer.host.shape == shape
    assert not run.trainer.kasmina.seeds
    assert math.isfinite(run.loss)
    # The lost time is charged, and the data's cursor went back: fewer batches were learned from than paid for.
    assert run.ledger.steps == 90
    assert run.trainer.steps - steps == 90 - rollback.optimizer_step
    # The controller is told, and may not do it again for a while.
    telemetry = transition.telemetry
    assert (telemetry.get("last_graft_outcome"), telemetry.get("last_graft_outcome_measured")) == (-1, 1)
    site = telemetry.site_ids.index("h0.ffn")
    masks = []
    for _ in range(4):
        masks.append((run.telemetry.sites[site, SITE.index("lockout")], run.telemetry.mask[row(run, "ffn")]))
        act(run)
    assert masks == [(1, False), (1, False), (0, True), (0, True)]
    while not run.ended:
        act(run)
    assert run.summary()["failure"] is None


def test_after_a_rollback_the_run_is_the_one_that_never_grafted(spec, tokens):
    """Weights, moments, batches, dropout: all as from the snapshot."""
    spec = changed(spec, host={"dropout": 0.1})
    run = started(spec, tokens, lambda run: poison(seed_weight(run)) if run.trainer.kasmina.seeds else None)
    act(run, "block")
    never = started(spec, tokens)
    never.trainer.forget()
    rollback = run.rollbacks[0].optimizer_step - 60
    for step in range(60 + rollback, 90):
        never.ledger.steps = step  # the rate follows the budget, which the lost steps have used
        never.trainer.step(never._rate())
    assert same_weights(run, never.trainer.host.state_dict())


@pytest.mark.parametrize("action", [(), ("ffn", None, "prune")], ids=["wait", "prune"])
def test_a_fault_after_probation_costs_no_graft_and_undoes_a_prune(spec, tokens, action):
    run = started(spec, tokens)
    act(run, "ffn")
    act(run)
    assert (run.grafts[-1].outcome, run.telemetry.get("last_graft_outcome")) == ("kept", 1)
    run.on_step = lambda run: poison(run.trainer.host.ln_f.weight) if not run.rollbacks else None
    act(run, *action)
    assert [rollback.removed for rollback in run.rollbacks] == [None]
    assert len(run.trainer.kasmina.seeds) == 1
    assert run.prunes == []
    assert run.grafts[-1].outcome == "kept"


@pytest.mark.parametrize(
    ("first", "second", "gone"),
    [(("ffn", "h0.ffn"), ("ffn", "h0.ffn"), [1]), (("block", "h0.stream"), ("ffn", "h1.ffn"), [0, 1])],
    ids=["beside", "inside"],
)
def test_a_fault_after_a_prune_of_one_of_two_young_seeds_leaves_true_records(spec, tokens, first, second, gone):
    run = begun(changed(spec, growth={"probation_steps": 200}), tokens)
    act(run, *first)
    act(run, *second)
    run.on_step = lambda run: poison(run.trainer.host.ln_f.weight) if not run.rollbacks else None
    act(run, *second, "prune")
    assert [i for i, graft in enumerate(run.grafts) if graft.outcome == "rolled back"] == gone
    assert [seed.number for seed in run.trainer.kasmina.seeds] == [i for i in range(2) if i not in gone]


def test_three_in_a_row_end_the_run_with_a_sound_checkpoint_and_the_rent_paid(spec, tokens):
    run = started(spec, tokens)
    before, sound = run.loss, weights(run)
    run.on_step = lambda run: poison(run.trainer.host.ln_f.weight) if run.trainer.unread else None
    transition = act(run)
    assert transition.terminated
    assert run.failure == "the loss was not finite, 3 times in a row"
    assert len(run.rollbacks) == 3
    assert (run.trainer.evaluate(), run.trainer.evaluate(whole=True)) == (before, run.loss)
    assert transition.telemetry.problems(run.space) is None
    rent = spec.reward.rent * (1 - 60 / 240)  # what it used and what it did not, at a constant size on a step budget
    assert transition.reward == pytest.approx(-rent, rel=0.01)
    restored = GrowthRun(spec, tokens)
    restored.load(*run.state())
    assert restored.ended
    assert same_weights(restored, sound)
    assert restored.trainer.evaluate(whole=True) == run.loss


def test_faults_with_a_sound_decision_between_them_do_not_end_it(spec, tokens):
    run = started(spec, tokens)
    for _ in range(2):
        poison(run.trainer.host.ln_f.weight)
        act(run)
        act(run)
    assert len(run.rollbacks) == 2
    assert not run.ended
