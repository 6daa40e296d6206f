"""An episode keeps its books: rewards, decisions, legality, telemetry. A surrogate's is exact, and noisy to look at."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.platform.telemetry import CANDIDATE, SITE
from esper.workers.instances import instance_set
from esper.workers.laws.oracle import bound
from esper.workers.laws.scaling_law import CONTINUOUS, ScalingLaw, size_of
from esper.workers.laws.surrogate import LOSS_NOISE, VOCABULARY, SurrogateRun, drawn_laws
from tests.workers.growing_run import act, row, same_telemetry

AMOUNTS = {"parameter_seconds": 5e5, "steps": 4000, "tokens": 4e6, "seconds": 30, "flops": 4e11}
AXES = st.sampled_from(list(AMOUNTS))


def start(axis="parameter_seconds", *overrides, seed=0, **instance):
    spec = load_spec("tinystories-char", [f"budget.axis={axis}", f"budget.amount={AMOUNTS[axis]}", *overrides])
    run = SurrogateRun(spec)
    run.reset(Instance(**instance), seed)
    return run


def randomly(run, random, eagerness=0.5):
    index = int(random.choice(run.telemetry.legal())) if random.random() < eagerness else 0
    return run.step(GraftAction(index, run.telemetry.sequence))


def size_loss(run):
    return run.law.size_loss(size_of(run.shape)[:, 0])


@given(AXES, st.integers(0, 2**40), st.floats(0, 1), st.floats(0.25, 4), st.integers(1, 3))
def test_rewards_telescope_no_play_beats_the_oracle_and_observations_are_sound(axis, seed, eagerness, budget, n_layer):
    run, random = start(axis, seed=seed, budget=budget, n_layer=n_layer), np.random.default_rng(seed)
    spec, first_loss, rewards = run.spec, run.loss, []
    while not run.ended:
        assert run.telemetry.problems(run.space) is None
        transition = randomly(run, random, eagerness)
        rewards.append(transition.reward)
        assert abs(run.ledger.tokens - run.ledger.steps * run.tokens_per_step) <= run.tokens_per_step
        if axis in CONTINUOUS:  # every decision stands exactly on its boundary
            assert run.reading() == pytest.approx(run.clock.passed * run.clock.slice, rel=1e-9)
            assert run.fraction() == run.clock.passed / run.clock.decisions
    summary = transition.info["summary"]
    assert len(rewards) == summary["decisions"] <= spec.budget.decisions
    rent = spec.reward.rent * run.ledger.parameter_seconds / run.reference
    assert sum(rewards) == pytest.approx(first_loss - run.loss - rent, abs=1e-9)
    assert run.reading() >= run.clock.amount * (1 - 1e-9)
    assert run.loss >= bound(spec, Instance(budget=budget, n_layer=n_layer), seed) - 1e-9
    fractions = [point["budget_fraction"] for point in summary["val_curve"]]
    assert fractions[0] == 0
    assert fractions == sorted(fractions)
    for graft in summary["grafts"]:
        assert graft["budget_fraction"] < spec.optimizer.decay_from
        assert graft["val_loss_after"] == pytest.approx(graft["val_loss_before"], abs=1e-9)


def test_a_late_reply_and_an_illegal_action_are_refused_and_change_nothing():
    run = start("steps", "growth.max_layers=1", "budget.decisions=2")
    act(run)
    ledger = run.ledger.as_dict()
    illegal = r"action \d+ is not legal here: the legal ones are wait"
    for action, sentence in (((0, 0), "late reply"), ((row(run, "block"), 1), illegal), ((10_000, 1), illegal)):
        with pytest.raises(UserError, match=sentence):
            run.step(GraftAction(*action))
    assert run.ledger.as_dict() == ledger
    act(run)
    with pytest.raises(UserError, match="has ended"):
        act(run)


@pytest.mark.parametrize(
    ("axis", "override", "blueprint"),
    [
        ("steps", "growth.max_layers=1", "block"),
        ("steps", "growth.max_parameters=20000", "block"),
        ("parameter_seconds", "growth.blueprints.attention.limit=2", "attention"),
        ("parameter_seconds", "growth.min_optimizer_steps=300", "block"),
    ],
)
def test_what_the_spec_forbids_is_not_legal(axis, override, blueprint):
    telemetry = start(axis, override).telemetry
    rows = [i for i, action in enumerate(telemetry.actions) if action.blueprint == blueprint]
    assert rows
    steps = 10 ** telemetry.candidate_column("steps_per_decision") - 1
    enough = steps >= 300 * (1 - 1e-6) if "min_optimizer_steps" in override else np.zeros(len(steps), bool)
    assert [telemetry.mask[i] for i in rows] == [enough[i] for i in rows]


def test_candidates_say_what_they_cost_and_where_they_are():
    run = start("tokens")
    telemetry, before = run.telemetry, run.shape.parameters_count()
    for index in telemetry.legal()[1:]:
        action, values = telemetry.actions[index], telemetry.candidates[index]
        after = run.blueprints[action.blueprint].resized(run.shape, action.site).parameters_count()
        assert np.exp(values[CANDIDATE.index("parameters")]) == pytest.approx(after / before, rel=1e-5)
        assert np.array_equal(values[-len(SITE) :], telemetry.sites[telemetry.site_ids.index(action.site)])
        assert values[CANDIDATE.index("seconds")] > 0


def test_rent_bites_on_a_token_budget_only():
    """On a parameter-second budget the rent's sum is the same whatever grows; on tokens a bigger host pays more."""

    def rent(axis, grow):
        run = start(axis, seed=1)
        while not run.ended:
            act(run, "block" if grow and run.sequence < 2 else None)
        return run.ledger.parameter_seconds / run.reference

    assert rent("parameter_seconds", True) == pytest.approx(rent("parameter_seconds", False), rel=0.01)
    assert rent("tokens", False) == pytest.approx(1, rel=0.01)
    assert rent("tokens", True) > 2


def test_a_graft_steepens_the_losss_fall_and_a_prune_raises_it_by_what_the_size_was_worth():
    waits, grows = (start("tokens", law=5) for _ in range(2))
    born = size_loss(grows)
    for blueprint in (None, None, None, None, "block"):
        act(waits)
        act(grows, blueprint)
    assert grows.loss < waits.loss  # equal tokens
    grown = size_loss(grows)
    act(grows, "block", None, "prune")
    (record,) = grows.prunes
    assert record.val_loss_after - record.val_loss_before == pytest.approx(born - grown, abs=1e-12)
    assert born > grown


def test_a_graft_that_costs_more_than_a_slice_merges_decisions():
    run = start("seconds", "clock.graft_seconds=3.0")  # slices of 1.25 s
    act(run, "ffn")
    assert run.clock.passed == 3
    assert run.reading() == pytest.approx(3 * run.clock.slice)
    assert run.ledger.steps == round(0.75 / run.spec.clock.step_seconds(run.shape, run.tokens_per_step))


def test_noise_is_in_what_is_seen_alone():
    errors, random = [], np.random.default_rng(0)
    for seed in range(15):
        run = start(law=1, seed=seed)
        while not run.ended:
            errors.append(run.telemetry.get("loss") * math.log(VOCABULARY) - run.loss)
            randomly(run, random, 0.1)
            assert run.curve[-1]["val_loss"] == run.loss
    assert np.std(errors) == pytest.approx(LOSS_NOISE, rel=0.15)
    assert abs(np.mean(errors)) < 5 * LOSS_NOISE / len(errors) ** 0.5


def test_with_fitted_laws_losses_err_as_a_runs_did_until_the_last():
    exact = start("steps", law=5)
    spec, decisions = exact.spec, exact.spec.budget.decisions
    errors = np.linspace(0.5, -0.1, decisions + 1)
    seen = {"offset": 0.1, "factor": 0.9, "errors": ((1e4, tuple(errors.tolist())),), "vocab_size": 91}
    run = SurrogateRun(spec, drawn_laws(spec, [5]).model_copy(update=seen))
    run.reset(seed=3)
    while not run.ended:
        law = exact.curve[-1]["val_loss"]
        assert run.loss == pytest.approx(0.1 + 0.9 * law + errors[run.sequence])
        assert run.telemetry.get("loss") == pytest.approx(run.loss / math.log(91))
        act(exact)
        act(run)
    assert run.loss == pytest.approx(exact.loss)


def test_a_seed_is_on_probation_for_as_many_steps_as_in_a_run():
    run, flags = start("steps", "growth.probation_steps=400"), []  # two decisions are 333 steps
    act(run, "block")
    for _ in range(3):
        flags.append([run.telemetry.site_column(name).sum() for name in ("on_probation", "established")])
        flags[-1].append(run.telemetry.get("last_graft_outcome"))
        act(run)
    assert flags == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert run.grafts[0].outcome == "kept"


@settings(max_examples=8)
@given(AXES, st.integers(0, 2**30), st.integers(1, 20))
def test_a_saved_run_goes_on_to_the_bit(axis, seed, decisions):
    run, restored = (start(axis, seed=seed, budget=0.7, law=seed) for _ in range(2))
    random = np.random.default_rng(seed)
    for _ in range(decisions):
        randomly(run, random)
    values, tensors = run.state()
    restored.load(json.loads(json.dumps(values)), tensors)
    assert same_telemetry(run.telemetry, restored.telemetry)
    while not run.ended:
        sequence = run.sequence
        ours, theirs = (randomly(each, np.random.default_rng(sequence)) for each in (run, restored))
        assert ours.reward == theirs.reward
        assert same_telemetry(ours.telemetry, theirs.telemetry)
    assert run.summary() == restored.summary()


def test_training_and_test_instances_share_nothing():
    spec = start().spec
    train, test = (instance_set(name, spec).values() for name in ("train", "test"))
    assert not {each.law for each in train} & {each.law for each in test}
    assert {each.n_layer for each in train} == {each.n_layer for each in test} == {1, 2, 3}
    laws = [ScalingLaw.drawn(each.law, spec) for each in train]
    heads_and_width = np.log([(law.heads, law.width) for law in laws])
    assert abs(np.corrcoef(heads_and_width.T)[0, 1]) < 0.3  # each its own draw
