"""The planner on laws, where the truth is known: it plans as the oracle does, and learns which law it is in."""

import json

import numpy as np
import pytest

from esper.pipelines.common.play import play
from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.policies.planner import PlannerPolicy
from esper.policies.static import StaticPolicy
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.laws.forecast import LEAST, member_losses, member_weights, members
from esper.workers.laws.oracle import bound
from esper.workers.laws.surrogate import SurrogateRun, drawn_laws

SPEC = load_spec("tinystories-char")
TRUTH = 500  # the number of a law
BUDGETS = (1 / 3, 1.0, 8 / 3)  # a factor of 8


@pytest.fixture(scope="module")
def run():
    return SurrogateRun(SPEC)


def ended(run, policy, instance):
    run.reset(instance, seed=1)
    return play(run, policy, arm="planner")["val_loss"]


@pytest.mark.parametrize(
    ("override", "budgets", "within"),
    [
        ("budget.decisions=24", BUDGETS, 0.01),  # more than `AHEAD` grafts are best with the largest
        ("clock.graft_seconds=4", (1 / 3,), 1e-6),  # grafts last for several decisions
        ("growth.max_layers=1", (1.0,), 1e-3),
    ],
)
def test_one_who_knows_the_law_reaches_the_bound(override, budgets, within):
    spec = load_spec("tinystories-char", [override])
    run, policy = SurrogateRun(spec), PlannerPolicy(drawn_laws(spec, [TRUTH]))
    for budget in budgets:
        instance = Instance(budget=budget, law=TRUTH)
        above = ended(run, policy, instance) - bound(spec, instance)
        assert -1e-9 <= above < within
        assert run.grafts


def test_a_graft_is_foretold_by_what_it_costs_at_its_own_site():
    """In a ResNet's last stage a block has sixteen times the parameters of one in the first."""
    spec = load_spec("digits", ["budget.decisions=2", "budget.amount=100000", "growth.min_optimizer_steps=1"])
    run, laws = SurrogateRun(spec), drawn_laws(spec, [TRUTH])
    telemetry = run.reset(Instance(law=TRUTH))
    finals, ends = run.forecast(laws), {}
    for row in telemetry.legal():
        run.reset(Instance(law=TRUTH))
        run.step(GraftAction(int(row), 0))
        ends[telemetry.actions[row]] = finals[row], play(run, StaticPolicy(), arm="static")["val_loss"]
    foretold, found = np.array([*ends.values()]).T
    np.testing.assert_allclose(foretold, found, atol=1e-9)
    blocks = {end for action, (_, end) in ends.items() if action.blueprint == "conv_block"}
    assert len(blocks) == 3  # a stage each


def test_among_other_laws_it_beats_every_static_size_and_tamiyo_over_a_factor_of_eight(run):
    truths = range(TRUTH, TRUTH + 3)
    policy = PlannerPolicy(drawn_laws(SPEC, [*range(29), *truths]))

    def above(policy, n_layer=None):  # the bound, in the mean
        played = [(budget, law) for budget in BUDGETS for law in truths]
        ends = [ended(run, policy, Instance(budget=budget, law=law, n_layer=n_layer)) for budget, law in played]
        return np.mean(ends) - np.mean([bound(SPEC, Instance(budget=budget, law=law)) for budget, law in played])

    others = {size: above(StaticPolicy(), size) for size in (1, 2, 3, 4)} | {"tamiyo": above(TamiyoPolicy())}
    assert above(policy) < 0.5 * min(others.values()), others


def test_losses_tell_the_truth_from_other_laws_but_never_all_at_once(run):
    laws = drawn_laws(SPEC, [*range(31), TRUTH])
    law = members(laws)
    run.reset(Instance(law=TRUTH), seed=1)
    told = []
    while not run.ended:
        losses = member_losses(run.curve, law)
        np.testing.assert_allclose(losses[:, -1], [point["val_loss"] for point in run.curve], rtol=1e-4)
        weights = member_weights(run, laws, losses)
        assert weights.sum() == pytest.approx(1)
        assert 1 / np.square(weights).sum() >= LEAST - 1e-6
        told.append(weights[-1])
        run.step(StaticPolicy().act(run.telemetry))
    assert told[0] == pytest.approx(1 / 32)
    assert weights.argmax() == 31
    assert told[-1] > 0.4
    shifted = laws.model_copy(update={"offset": 0.2, "misfit": 1.0})  # an error that all decisions share tells nothing
    assert member_weights(run, shifted, member_losses(run.curve, law)).argmax() == 31


def test_it_plays_the_same_again_and_after_a_resume(run):
    policy = PlannerPolicy(drawn_laws(SPEC, range(8)))
    ended(run, policy, Instance(law=TRUTH))
    first = run.summary()["grafts"]
    run.reset(Instance(law=TRUTH), seed=1)
    for _ in range(9):
        run.step(policy.act(run.telemetry, run))
    other = SurrogateRun(SPEC)
    other.load(*json.loads(json.dumps(run.state())))
    play(other, PlannerPolicy(drawn_laws(SPEC, range(8))), arm="planner")
    assert other.summary()["grafts"] == first
    assert len(first) > 2


def test_it_plays_legal_rows_and_asks_for_a_probe(run):
    policy = PlannerPolicy(drawn_laws(SPEC, [TRUTH]))
    telemetry = run.reset(Instance(law=TRUTH), seed=1)
    finals = run.forecast(policy.laws)
    legal = np.isin(np.arange(len(telemetry.actions)), telemetry.legal())
    np.testing.assert_array_equal(np.isfinite(finals), legal)
    with pytest.raises(UserError, match="given no probe"):
        policy.act(telemetry)
    steep = policy.laws.model_copy(update={"ensemble": {**policy.laws.ensemble, "reference": (1e9,)}})
    run.step(StaticPolicy().act(telemetry))
    with pytest.raises(UserError, match="say nothing of a host as small as this one"):
        run.forecast(steep)
