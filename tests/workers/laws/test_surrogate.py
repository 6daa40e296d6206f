"""A surrogate's episode is what its docstring says: continuous, exact at its boundaries, noisy only to look at."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.contracts import GraftAction, Instance
from esper.platform.spec import load_spec
from esper.platform.telemetry import Telemetry
from esper.workers.instances import instance_set
from esper.workers.laws.scaling_law import CONTINUOUS, ScalingLaw, size_of
from esper.workers.laws.surrogate import LOSS_NOISE, VOCABULARY, SurrogateRun

AMOUNTS = {"parameter_seconds": 5e5, "seconds": 30, "flops": 4e11, "tokens": 4e6, "steps": 4000}


def spec_for(axis="parameter_seconds", *overrides):
    return load_spec("tinystories-char", [f"budget.axis={axis}", f"budget.amount={AMOUNTS[axis]}", *overrides])


def step(run: SurrogateRun, operation="wait", blueprint=None):
    """Play the first legal row of that kind."""
    telemetry = run.telemetry
    rows = [i for i in telemetry.legal() if telemetry.actions[i].operation == operation]
    row = next(i for i in rows if blueprint in (None, telemetry.actions[i].blueprint))
    return run.step(GraftAction(int(row), telemetry.sequence))


def randomly(run: SurrogateRun, random: np.random.Generator, eagerness: float = 0.5):
    """Play a random legal row."""
    telemetry = run.telemetry
    row = int(random.choice(telemetry.legal())) if random.random() < eagerness else 0
    return run.step(GraftAction(row, telemetry.sequence))


def same(one: Telemetry, other: Telemetry) -> bool:
    arrays = zip(one.arrays().values(), other.arrays().values(), strict=True)
    return one.actions == other.actions and all(np.array_equal(a, b) for a, b in arrays)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(CONTINUOUS), st.integers(0, 2**30), st.floats(0.25, 4))
def test_every_decision_stands_exactly_on_its_boundary(axis, seed, budget):
    run, random = SurrogateRun(spec_for(axis)), np.random.default_rng(seed)
    run.reset(Instance(budget=budget), seed)
    while not run.ended:
        randomly(run, random)
        assert run.reading() == pytest.approx(run.clock.passed * run.clock.slice, rel=1e-9)
        assert run.fraction() == run.clock.passed / run.clock.decisions
        assert abs(run.ledger.tokens - run.ledger.steps * run.tokens_per_step) <= run.tokens_per_step
        assert run.ledger.tokens == round(run.steps * run.tokens_per_step)


def test_a_graft_leaves_the_loss_and_steepens_its_fall():
    waits, grows = SurrogateRun(spec_for("tokens")), SurrogateRun(spec_for("tokens"))
    for run in (waits, grows):
        run.reset(Instance(law=5))
        for _ in range(4):
            step(run)
    step(waits)
    step(grows, "graft", "block")
    assert grows.grafts[0].val_loss_after == grows.grafts[0].val_loss_before
    assert grows.loss < waits.loss  # equal tokens


def test_a_prune_raises_the_loss_by_what_the_size_was_worth():
    run = SurrogateRun(spec_for())
    run.reset(Instance(law=3))
    born = run.law.size_loss(size_of(run.shape)[:, 0])
    step(run, "graft", "ffn")
    grown = run.law.size_loss(size_of(run.shape)[:, 0])
    step(run, "prune", "ffn")
    record = run.prunes[0]
    assert record.val_loss_after - record.val_loss_before == pytest.approx(born - grown, abs=1e-12)
    assert born > grown


def test_a_graft_that_costs_more_than_a_slice_merges_decisions():
    run = SurrogateRun(spec_for("seconds", "clock.graft_seconds=3.0"))  # slices of 1.25 s
    run.reset()
    step(run, "graft")
    assert run.clock.passed == 3
    assert run.reading() == pytest.approx(3 * run.clock.slice)
    assert run.ledger.steps == round(0.75 / run.spec.clock.step_seconds(run.shape, run.tokens_per_step))


def test_noise_is_in_what_is_seen_alone():
    run = SurrogateRun(spec_for())
    errors, random = [], np.random.default_rng(0)
    for seed in range(15):
        telemetry = run.reset(Instance(law=1), seed)
        while not run.ended:
            errors.append(telemetry.get("loss") * math.log(VOCABULARY) - run.loss)
            before = run.loss
            transition = randomly(run, random, 0.1)
            rent = run.spec.reward.rent / run.clock.decisions
            assert transition.reward == pytest.approx(before - run.loss - rent, abs=1e-6)
            assert run.curve[-1]["val_loss"] == run.loss
            telemetry = transition.telemetry
    assert np.std(errors) == pytest.approx(LOSS_NOISE, rel=0.15)
    assert abs(np.mean(errors)) < 5 * LOSS_NOISE / len(errors) ** 0.5


def test_gradient_norms_tell_where_growing_is_of_use():
    """Over laws: the kind of site with the largest norm is mostly the one whose graft lowers the size's loss most."""
    run, hits = SurrogateRun(spec_for()), 0
    kinds = {"h0.attention": "attention", "h0.ffn": "ffn", "h0.stream": "block"}
    for law in range(60):
        first = run.reset(Instance(law=law), seed=law)
        assert not first.site_column("norms_measured").any()
        telemetry = step(run).telemetry
        assert telemetry.site_column("norms_measured").all()
        norms = dict(zip(telemetry.site_ids, telemetry.site_column("gradient_norm"), strict=True))
        now = run.law.size_loss(size_of(run.shape)[:, 0])
        use = {
            site: now - run.law.size_loss(size_of(run.blueprints[kind].resized(run.shape, site))[:, 0])
            for site, kind in kinds.items()
        }
        for site in kinds:
            assert norms[site] * 10 == pytest.approx(math.log(use[site]), abs=1.0)
        hits += max(kinds, key=lambda site: norms[site]) == max(use, key=lambda site: use[site])
    assert hits >= 50


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(list(AMOUNTS)), st.integers(0, 2**30), st.integers(1, 20))
def test_a_saved_run_goes_on_to_the_bit(axis, seed, decisions):
    run, restored = SurrogateRun(spec_for(axis)), SurrogateRun(spec_for(axis))
    random = np.random.default_rng(seed)
    run.reset(Instance(budget=0.7, law=seed), seed)
    for _ in range(decisions):
        randomly(run, random)
    values, tensors = run.state()
    restored.load(json.loads(json.dumps(values)), tensors)
    assert same(run.telemetry, restored.telemetry)
    other = copy.deepcopy(random)
    while not run.ended:
        ours, theirs = randomly(run, random), randomly(restored, other)
        assert ours.reward == theirs.reward
        assert same(ours.telemetry, theirs.telemetry)
    assert run.summary() == restored.summary()


def test_twins_are_charged_and_leave_the_run_as_it_was():
    run = SurrogateRun(spec_for("parameter_seconds", "budget.amount=3000000"))
    run.reset(Instance(law=8))
    step(run)
    loss, shape, ledger = run.loss, run.shape, run.ledger.as_dict()
    rows = [0, *(int(i) for i in run.telemetry.legal()[1:3])]
    losses = run.twins([GraftAction(i, 1) for i in rows], 50)
    assert losses.shape == (3, 50)
    assert (run.loss, run._evaluate(), run.shape) == (loss, loss, shape)
    assert run.ledger.steps == ledger["steps"] + 150
    assert run.ledger.parameter_seconds > ledger["parameter_seconds"]
    ahead = (losses[0] - losses[1:]).mean(axis=1)
    assert (ahead > -0.001).all()  # on the same batches: the batches' own spread is 20 times that
    detrended = losses - losses.mean(axis=0)
    assert np.diff(detrended[0]).std() < 0.1 * np.diff(losses[0]).std()


def test_training_and_test_instances_share_nothing():
    spec = spec_for()
    train, test = (instance_set(name, spec).values() for name in ("train", "test"))
    assert not {each.law for each in train} & {each.law for each in test}
    assert {each.n_layer for each in train} == {each.n_layer for each in test} == {1, 2, 3}
    assert instance_set("train", spec) == instance_set("train", spec)
    laws = [ScalingLaw.drawn(each.law or 0, spec) for each in train]
    heads = np.log([law.heads for law in laws])
    width = np.log([law.width for law in laws])
    assert abs(np.corrcoef(heads, width)[0, 1]) < 0.3  # each its own draw
