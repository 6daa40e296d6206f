"""An episode keeps its books: rewards, decisions, legality, telemetry. On SurrogateRun, whose loss is a formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.platform.telemetry import CANDIDATE, SITE
from esper.workers.laws.surrogate import SurrogateRun

AXES = st.sampled_from(["parameter_seconds", "steps", "tokens", "seconds", "flops"])
AMOUNTS = {"parameter_seconds": 5e5, "steps": 4000, "tokens": 4e6, "seconds": 30, "flops": 4e11}


def spec_for(axis, *overrides):
    return load_spec("tinystories-char", [f"budget.axis={axis}", f"budget.amount={AMOUNTS[axis]}", *overrides])


@given(AXES, st.integers(0, 2**40), st.floats(0, 1))
def test_rewards_telescope_and_every_observation_is_sound(axis, seed, eagerness):
    spec = spec_for(axis)
    run = SurrogateRun(spec)
    random = np.random.default_rng(seed)
    telemetry = run.reset(seed=seed)
    first_loss, rewards, decisions = run.loss, [], 0
    while True:
        assert telemetry.problems(run.space) is None
        legal = telemetry.legal()
        index = int(random.choice(legal)) if random.random() < eagerness else 0
        transition = run.step(GraftAction(index, telemetry.sequence))
        rewards.append(transition.reward)
        telemetry = transition.telemetry
        decisions += 1
        if transition.terminated:
            break
    summary = transition.info["summary"]
    assert decisions == summary["decisions"] <= spec.budget.decisions
    rent = spec.reward.rent * run.ledger.parameter_seconds / run.reference
    assert sum(rewards) == pytest.approx(first_loss - run.loss - rent, abs=1e-9)
    assert run.reading() >= run.clock.amount * (1 - 1e-9)
    fractions = [point["budget_fraction"] for point in summary["val_curve"]]
    assert fractions[0] == 0
    assert fractions == sorted(fractions)
    for graft in summary["grafts"]:
        assert graft["budget_fraction"] < spec.optimizer.decay_from
        assert graft["val_loss_after"] == pytest.approx(graft["val_loss_before"], abs=1e-9)


def test_a_late_reply_and_an_illegal_action_are_refused_and_change_nothing():
    run = SurrogateRun(spec_for("steps", "growth.max_layers=1"))
    first = run.reset(seed=0)
    second = run.step(GraftAction(0, first.sequence)).telemetry
    ledger = run.ledger.as_dict()
    with pytest.raises(UserError, match="late reply"):
        run.step(GraftAction(0, first.sequence))
    block = next(i for i, action in enumerate(second.actions) if action.blueprint == "block")
    with pytest.raises(UserError, match="not legal here"):
        run.step(GraftAction(block, second.sequence))
    with pytest.raises(UserError, match="not legal here"):
        run.step(GraftAction(10_000, second.sequence))
    assert run.ledger.as_dict() == ledger
    run.step(GraftAction(0, second.sequence))


def test_an_ended_episode_takes_no_more_actions():
    run = SurrogateRun(spec_for("steps", "budget.decisions=1"))
    telemetry = run.step(GraftAction(0, run.reset().sequence)).telemetry
    with pytest.raises(UserError, match="has ended"):
        run.step(GraftAction(0, telemetry.sequence))


@pytest.mark.parametrize(
    ("overrides", "blueprint"),
    [
        (["growth.max_layers=1"], "block"),
        (["growth.max_parameters=20000"], "block"),
        (["growth.blueprints.attention.limit=2"], "attention"),
        (["growth.min_optimizer_steps=300"], "block"),
    ],
)
def test_what_the_spec_forbids_is_not_legal(overrides, blueprint):
    amount = [] if "max" in overrides[0] else ["budget.axis=parameter_seconds", "budget.amount=500000"]
    run = SurrogateRun(spec_for("steps", *overrides, *amount))
    telemetry = run.reset()
    rows = [i for i, action in enumerate(telemetry.actions) if action.blueprint == blueprint]
    assert rows
    if "min_optimizer_steps" in overrides[0]:
        steps = 10 ** telemetry.candidate_column("steps_per_decision") - 1
        assert all(telemetry.mask[i] == (steps[i] >= 300 * (1 - 1e-6)) for i in rows)
    else:
        assert not telemetry.mask[rows].any()


def test_candidates_say_what_they_cost_and_where_they_are():
    run = SurrogateRun(spec_for("tokens"))
    telemetry = run.reset()
    before = run.shape.parameters_count()
    for index in telemetry.legal()[1:]:
        action = telemetry.actions[index]
        after = run.blueprints[action.blueprint].resized(run.shape, action.site)
        row = telemetry.candidates[index]
        assert np.exp(row[CANDIDATE.index("parameters")]) == pytest.approx(after.parameters_count() / before, rel=1e-5)
        site = telemetry.site_ids.index(action.site)
        assert np.array_equal(row[-len(SITE) :], telemetry.sites[site])
        assert row[CANDIDATE.index("seconds")] > 0


def test_instances_vary_the_budget_and_the_start():
    run = SurrogateRun(spec_for("steps"))
    run.reset(Instance(budget=0.5, n_layer=3))
    assert run.clock.amount == 2000
    assert run.shape.depth() == 3


def test_rent_bites_on_a_token_budget_only():
    """On a parameter-second budget the rent's sum is the same whatever grows; on tokens a bigger host pays more."""

    def rent(axis, grow):
        run = SurrogateRun(spec_for(axis))
        telemetry = run.reset(seed=1)
        while True:
            block = [i for i in telemetry.legal() if telemetry.actions[i].blueprint == "block"]
            index = block[0] if grow and block and telemetry.sequence < 2 else 0
            transition = run.step(GraftAction(int(index), telemetry.sequence))
            telemetry = transition.telemetry
            if transition.terminated:
                return run.ledger.parameter_seconds / run.reference

    assert rent("parameter_seconds", True) == pytest.approx(rent("parameter_seconds", False), rel=0.01)
    assert rent("tokens", False) == pytest.approx(1, rel=0.01)
    assert rent("tokens", True) > 2
