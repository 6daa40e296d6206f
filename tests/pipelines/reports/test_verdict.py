"""What a verdict says, on sweeps whose truth is known: `synthetic_sweeps` makes them up."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from esper.pipelines.common.statistics import detectable
from esper.pipelines.reports.paired_tests import BASELINES, PairedTest, holm
from esper.pipelines.reports.runs import AXES, Run
from esper.pipelines.reports.verdict import Verdict, efficiency, judge
from tests.pipelines.reports.synthetic_sweeps import BUDGET, FAILED, SyntheticSweep, graft, simulate

SWEEPS, NOISE = 300, 0.01
OWN = "parameter_seconds"
NO_MATCH = 1.6  # a loss that any arm gets below
WINS = {"tamiyo": 1.0, "onejump": 1.3}
DIVERGED = {"diverged": True, "val_loss": 99.0}


def five_equal(**changes: Any) -> SyntheticSweep:
    """Five arms and two controls that equal the best static size, and a schedule that is no match."""
    arms = dict.fromkeys(("tamiyo", "lag", "ppo", "openloop", "gradual", "random:tamiyo", "random:ppo"), 1.2)
    return SyntheticSweep(grown=arms | {"onejump": NO_MATCH}, **changes)


def judged(sweep: SyntheticSweep, runs: list[Run] | None = None, point: dict | None = None, **changes: Any) -> Verdict:
    """The verdict; `changes` go into `sweep.json`."""
    return judge(sweep.runs() if runs is None else runs, point or sweep.point(), sweep.sweep(**changes))


def found(verdict: Verdict, arm: str, baseline: str = "best static", axis: str = OWN) -> PairedTest:
    [test] = [t for t in verdict.tests if (t.arm, t.baseline, t.axis) == (arm, baseline, axis)]
    return test


def outcome(*args: Any) -> str:
    return found(*args).outcome[0]


@pytest.mark.parametrize(("axis", "share"), [(OWN, 1.0), ("flops", 0.6)])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(axis, share):
    """On the budget's axis and, interpolated between two annealed points, on another; size 2 is always the choice."""
    even = {f"static-{n}": {"flops": 1e12} for n in (1, 2, 3, 4)}
    sweep = SyntheticSweep(grown={"tamiyo": 1.23, "onejump": NO_MATCH}, cost=even | {"tamiyo": {"flops": share * 1e12}})
    low, high = (1.2 + sweep.slope * (at**-sweep.power - 1) for at in (0.5, 0.75))
    baseline = low + (high - low) * np.log(share / 0.5) / np.log(1.5) if axis == "flops" else 1.2
    covered = 0
    for trials in simulate(sweep, NOISE, 2 * SWEEPS):
        interval = next(t.interval for t in trials.tests(axis) if (t.arm, t.baseline) == ("tamiyo", "best static"))
        assert interval is not None
        covered += abs(interval.mean - (1.23 - baseline)) <= (interval.half or 0)
    assert 0.93 <= covered / (2 * SWEEPS) <= 0.97


@pytest.mark.parametrize("sizes", [{2: 1.2, 3: 1.21}, {2: 1.2, 3: 1.21, 4: 1.21, 5: 1.21}])
def test_no_arm_that_equals_the_best_static_wins_more_often_than_it_may(sizes):
    """Five such arms, static sizes that two tuning seeds cannot tell apart, and any winner counts; so for the controls.

    The others are as far from the best as one run's noise: nearer, a wrong choice costs little; farther, it is rare.
    """
    won = better = controls = chosen = 0
    for trials in simulate(five_equal(statics={1: 1.4} | sizes | {6: 1.4}), NOISE, SWEEPS):
        tests = trials.tests(trials.axis)
        won += efficiency(trials, tests, []).outcome == "met"
        ahead = {t.arm for t in tests if t.baseline == "best static" and t.outcome[0] == "better"}
        better += bool(ahead.intersection(trials.grown))
        controls += bool(ahead.intersection(trials.controls))
        chosen += trials.best_static != "static-2"
    assert chosen > SWEEPS / 10
    assert won <= better <= 0.05 * SWEEPS
    assert controls <= 0.05 * SWEEPS


def test_holm_and_p_are_the_fields():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    differences = np.random.default_rng(3).normal(-0.3, 1, 5)
    assert PairedTest(differences).p == pytest.approx(2 * ttest_1samp(differences, 0, alternative="less").pvalue)
    assert PairedTest(-differences).p == 1
    test = replace(PairedTest(np.array([-0.9, -0.1, -0.5, -1.1, -0.3])), p_holm=0.049)
    assert [each.outcome[0] for each in (test, replace(test, p_holm=0.051))] == ["better", "tie"]


@pytest.mark.parametrize("pairs", [2, 5, 20])
def test_a_difference_of_the_size_that_would_show_shows_in_four_of_five_sweeps(pairs):
    rng = np.random.default_rng(7)
    spread = np.array([-1.0, 1.0] * (pairs // 2) + [0.0] * (pairs % 2))
    least = (detectable(spread) or 0.0) / spread.std(ddof=1)  # in standard deviations
    drawn = rng.normal(-least, 1, (4000, pairs))
    shown = (ttest_1samp(drawn, 0, axis=1).pvalue <= 0.05) & (drawn.mean(1) < 0)
    assert np.mean(shown) == pytest.approx(0.8, abs=0.02)
    assert detectable(spread[:1]) is None


def test_every_grown_arm_is_held_against_every_baseline_on_every_axis():
    sweep = five_equal()
    verdict = judged(sweep)
    held = {(t.arm, t.baseline, t.axis) for t in verdict.tests}
    every = {(arm, baseline, axis) for arm in sweep.grown for baseline in BASELINES for axis in AXES}
    assert held == {key for key in every if key[:2] != ("onejump", "best schedule")}
    against = [found(verdict, "tamiyo", baseline).against for baseline in BASELINES]
    assert against == ["static_final:tamiyo", "static-2", "onejump"]


def wins(edits: dict[Any, dict[str, Any]] | None = None, seeds: int = 5, **truth: Any) -> SyntheticSweep:
    """Tamiyo ends below all its baselines, but for what is said."""
    return SyntheticSweep(**{"grown": WINS, "edits": edits or {}, "seeds": tuple(range(1, seeds + 1))} | truth)


def ending(loss: float, cost: float, axis: str = "seconds") -> SyntheticSweep:
    """Tamiyo ends at a loss after so many budgets, of which a static size of n layers takes 1/n of the seconds."""
    return wins(grown={"tamiyo": loss, "onejump": 1.2}, cost={"tamiyo": {axis: cost * BUDGET}})


EVEN = {f"static-{n}": {"tokens": 1e9} for n in (1, 2, 3, 4)} | {"tamiyo": {"tokens": 0.75e9}}
SHAPE = {"tamiyo": {"parameters": 2000}, "static_final:tamiyo": FAILED}  # that of static-2
BEST, SECONDS = ("best static", OWN), ("best static", "seconds")
# The sweep; the baseline and the axis; what stands for it, what is said of tamiyo, and why.
PAIRED = [
    (wins(seeds=4), BEST, "static-2: cannot say: 4 pairs, and a test takes 5"),
    # On test seeds size 3 turns out lower than the size that tuning chose, and than the arm.
    (wins({"static-3": {"val_loss": 1.14}}, grown={"tamiyo": 1.15}), BEST, "static-2: tie: .* every static size"),
    # Beyond all that was trained nothing good can be said; nor at 0.8, where size 2, which ended at 0.5, has no loss.
    (ending(1.1, 9), SECONDS, "static-2: cannot say: static-1, static-2, static-3, static-4 has no loss at this cost"),
    (ending(1.5, 9), SECONDS, "static-2: worse: it was lower at a lower cost already"),
    (ending(1.1, 9), ("best schedule", "seconds"), "onejump: cannot say: onejump was never trained that long"),
    (ending(1.3, 0.8), SECONDS, "static-1: cannot say: static-2, static-3, static-4 has no loss at this cost"),
    (ending(1.6, 0.8), SECONDS, "static-1: worse: $"),
    # An overshoot of the budget is no other cost.
    (ending(1.2, 1.019, OWN), BEST, "static-2: tie: $"),
    (ending(1.2, 1.03, OWN), BEST, "static-2: cannot say: static-2 was never trained that long"),
    # To diverge once is enough, however low the rest; a seed without a loss is left out, and named.
    (wins({("tamiyo", 3): DIVERGED}), BEST, "static-2: worse: tamiyo diverged on seed 3"),
    (wins({"tamiyo": DIVERGED}), BEST, "static-2: worse: tamiyo diverged on seed 1, tamiyo diverged on seed 2, "),
    (wins({("tamiyo", 3): DIVERGED}, forks=(), cost={"tamiyo": {"seconds": 9.0}}), SECONDS, ".*worse: tamiyo diverged"),
    (wins({("static-2", 3): DIVERGED}, seeds=6), BEST, "static-2: better: static-2 has no loss on seed 3"),
    (wins({("tamiyo", 3): FAILED}, seeds=6), BEST, "static-2: better: tamiyo has no loss on seed 3"),
    (wins({("tamiyo", 3): {"grafts": []}}), BEST, "static-2: cannot say: it grew on 4 seeds only, and a test takes 5"),
    # A shape that is a static size on every seed is held against that size.
    (wins(SHAPE), ("final size", OWN), "static-2: better: $"),
    (wins(SHAPE | {("tamiyo", 1): {"parameters": 9}}), ("final size", OWN), "static_final:tamiyo: cannot say: 0 pairs"),
    (wins(grown={"tamiyo": 1.0}), ("best schedule", OWN), "None: cannot say: it was not trained"),
    # At another cost another size is the best.
    (wins(statics={1: 1.5, 2: 1.3, 3: 1.2}, cost=EVEN), ("best static", "tokens"), "static-3: better: $"),
]


@pytest.mark.parametrize(("sweep", "where", "told"), PAIRED)
def test_what_a_paired_test_says(sweep, where, told):
    test = found(judged(sweep), "tamiyo", *where)
    assert re.match(told, ": ".join([str(test.against), *test.outcome]))


def test_an_arm_that_never_grew_cannot_win_and_is_told():
    """It ends below everything, for its rate was another one; and beside it none has grown."""
    sweep = SyntheticSweep(grown=WINS, idle=("tamiyo",))
    verdict = judged(sweep)
    assert verdict.trials.idle == ["tamiyo"]
    assert "tamiyo" not in {test.arm for test in verdict.tests}
    assert verdict.criteria[0].outcome == "not met"
    assert "tamiyo did not grow" in verdict.criteria[0].sentence
    none, mechanics, _ = judged(replace(sweep, idle=("tamiyo", "onejump"))).criteria
    assert (none.outcome, mechanics.outcome) == ("cannot say", "cannot say")
    assert none.sentence.startswith("At 1,000,000 parameter-seconds no arm grew; tamiyo did not grow; onejump did not")


def test_equal_runs_tie_on_every_axis():
    """To the bit: whatever else would stand in the way of a comparison."""
    sweep = wins(grown={"tamiyo": 1.3, "onejump": 1.3}, seeds=2)
    runs = [run for run in sweep.runs() if run.label != "tamiyo"]
    runs += [replace(run, label="tamiyo", arm="tamiyo") for run in runs if run.label == "onejump"]
    verdict = judged(sweep, runs)
    assert {outcome(verdict, "tamiyo", "best schedule", axis) for axis in AXES} == {"tie"}


LAG = {"label": "lag", "grid": "{}", "status": "failed"}
# What is said; and which change of the grid point or of the sweep brings it about.
CAVEATS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("only 4 test seeds", {}, {"seeds": [1, 2, 3, 4]}),
    ("static-2, the best static size, is at the edge", {}, {"sizes": [2, 3, 4]}),
    ("static-4, the best static size, is at the edge", {"size": 4}, {}),
    ("static-1 is the best static size, and the smallest", {"size": 1}, {}),
    ("static-2, the best static size, is at the edge", {}, {"sizes": [1, 2, 3, "2x96", "2x128"]}),  # of 256 as it is
    ("static-2, the best static size, is at the edge", {}, {"sizes": [1, 2, 3, "2h8"]}),
    ("rates of the static sizes were not tuned", {}, {"rates_tuned": False}),
    ("size or schedule was chosen on the test seeds", {}, {"tuning_seeds": []}),
    ("size or schedule was chosen on the test seeds", {"schedule": None}, {}),
    ("1 trial without a result (lag-7: failed)", {}, {"trials": {"lag-7": LAG}}),
    ("(lag-9: not in MLflow)", {}, {"trials": {"lag-9": LAG | {"status": "done"}}}),
    ("40 runs ended more than 2% off the budget", {"budget": {"axis": OWN, "amount": 1.03 * BUDGET}}, {}),
]


@pytest.mark.parametrize(("said", "point", "sweep"), CAVEATS)
def test_a_caveat_is_said_when_it_holds_alone_and_withholds_the_verdict(said, point, sweep):
    truth = SyntheticSweep(grown=WINS)
    efficient, mechanics, _ = judged(truth, point=truth.point(**point), **sweep).criteria
    [caveat] = efficient.withheld
    assert said in caveat
    assert efficient.outcome == "withheld"
    assert efficient.sentence.startswith("By the numbers alone, at 1,0")
    assert "tamiyo ends lower than all baselines" in efficient.sentence
    assert (mechanics.outcome, mechanics.withheld) == ("met", ())


def test_what_withholds_nothing():
    """Trials of another grid point or that ended; and measured budgets, if they give nearly equal work."""
    elsewhere = {"lag-9": LAG | {"grid": '{"budget.amount": 1}'}, "tamiyo-1": LAG | {"status": "done"}}
    truth = SyntheticSweep(grown=WINS, edits={("static-2", 4): {"steps": 96}})
    assert judged(truth, trials=elsewhere).criteria[0].outcome == "met"
    between = [1, "2x96", 2, "1x512", 3, "2x512"]  # larger and smaller ones in each dimension
    assert judged(truth, sizes=between).criteria[0].outcome == "met"
    [caveat] = judged(replace(truth, edits={("static-2", 4): {"steps": 94}})).criteria[0].withheld
    assert "Equal measured budgets gave static-2 from 94 to 100 steps, more than 5% apart" in caveat


def test_un_annealed_points_and_other_runs_change_nothing():
    """Losses of mid-run, of runs that diverged, of rate trials, of another grid point, and of a trial's first try.

    Nor do forks without a loss, or their order.
    """
    before = judged(five_equal(edits={("ppo", 2): DIVERGED}))
    sweep = five_equal(edits={("ppo", 2): DIVERGED | {"val_loss": -100.0}})
    runs = sweep.runs()
    for run in runs:
        run.summary["val_curve"] = [point | {"val_loss": -50.0} for point in run.summary["val_curve"]]
        first, *others = run.summary["annealed"]
        run.summary["annealed"] = [*reversed(others), first | {"val_loss": None}, first]
    for change in ({"purpose": "rates"}, {"grid": '{"budget.amount": 1}'}):
        runs += [replace(run, **change, summary=run.summary | {"val_loss": -1.0}) for run in sweep.runs()]
    runs += [replace(run, status="FAILED", summary={}) for run in sweep.runs()]
    after = judged(sweep, runs)
    assert [test.as_dict() for test in after.tests] == [test.as_dict() for test in before.tests]
    assert after.criteria == before.criteria


NOBODY = "no grown arm ends lower than all baselines"
LOWEST = "At 1,000,000 parameter-seconds ppo ends lower than all baselines; of the grown arms ppo ends lowest: -0.1"


@pytest.mark.parametrize(
    ("grown", "truth", "said", "outcomes"),
    [
        ({"ppo": 1.1, "tamiyo": 1.2, "onejump": 1.25}, {}, LOWEST, ["better", "better", "better"]),
        ({"ppo": 1.1, "onejump": 1.3}, {"statics": {1: 1.4, 2: 1.0, 3: 1.25}}, NOBODY, ["better", "worse", "better"]),
        ({"ppo": 1.1, "onejump": 1.3}, {"final_size": 1.0}, NOBODY, ["worse", "better", "better"]),
        ({"ppo": 1.1, "onejump": 1.1}, {}, "onejump ends lower than all", ["better", "better", "tie"]),
        # A control that beats all does not win, nor make the correction for the others any stricter.
        ({"ppo": 1.2, "onejump": 1.3, "random:ppo": 1.0}, {}, NOBODY, ["better", "tie", "better"]),
    ],
)
def test_a_winner_has_to_win_against_all_three(grown, truth, said, outcomes):
    verdict = judged(SyntheticSweep(grown=grown, **truth))
    assert said in verdict.criteria[0].sentence
    assert "5 pairs with its spread would show a difference of 0.000" in verdict.criteria[0].sentence  # noise: 0.0001
    assert verdict.criteria[0].outcome == ("not met" if said == NOBODY else "met")
    assert [outcome(verdict, "ppo", baseline) for baseline in BASELINES] == outcomes
    family = [found(verdict, arm) for arm in grown if "random" not in arm]
    assert [test.p_holm for test in family] == holm([test.p for test in family]).tolist()
    controls = [test for test in verdict.tests if test.arm == "random:ppo" and test.axis == OWN]
    assert all(test.outcome[0] == "better" and test.p_holm == test.p for test in controls)  # a family of one


def test_a_budget_of_steps_is_one_of_tokens():
    """Every arm takes as many tokens in a step; the words stay the user's."""
    sweep = SyntheticSweep(grown={"ppo": 1.0, "tamiyo": 1.2, "onejump": 1.3})
    sweep.cost = {label: {"tokens": 1e9} for label in sweep.truths()}
    verdict = judged(sweep, point=sweep.point(budget={"axis": "steps", "amount": 100.0}))
    assert verdict.criteria[0].outcome == "met"
    assert verdict.criteria[0].sentence.startswith("At 100 steps ppo ends lower than all baselines")
    assert outcome(verdict, "tamiyo", "best static", "tokens") == "tie"


def test_without_static_runs_there_is_no_best_static():
    sweep = SyntheticSweep()
    verdict = judged(sweep, [run for run in sweep.runs() if run.arm != "static"], sweep.point(size=None))
    assert {(t.against, t.outcome[0]) for t in verdict.tests if t.baseline == "best static"} == {(None, "cannot say")}


@pytest.mark.parametrize(
    ("change", "said", "told"),
    [
        ({}, "met", "by at most 1.0e-06 nats; none of them was rolled back; 0 runs that had grown diverged."),
        ({"val_loss_after": 1.5009}, "met", "9.0e-04"),
        ({"val_loss_after": 1.4985}, "not met", "1.5e-03"),
        ({"val_loss_after": None}, "not met", "inf"),
        ({"val_loss_after": 1.5, "identity": 4e-5}, "met", "by at most 8.0e-05 nats"),
        ({"val_loss_after": 1.5, "identity": 1e-3}, "not met", "2.0e-03"),
        ({"outcome": "rolled back"}, "not met", "1 of them was rolled back"),
        (DIVERGED, "not met", "1 run that had grown diverged (random:tamiyo on seed 2)"),
    ],
)
def test_mechanics_is_met_when_no_graft_did_harm_whoever_chose_it(change, said, told):
    """And whatever happens to runs that did not grow."""
    edit = change if change is DIVERGED else {"grafts": [graft(**change)]}
    edits = {("random:tamiyo", 2): edit, ("static-1", 2): DIVERGED}
    mechanics = judged(SyntheticSweep(grown={"tamiyo": 1.2, "random:tamiyo": 1.3}, edits=edits)).criteria[1]
    assert (mechanics.outcome, mechanics.sentence[:20]) == (said, "14 grafts on 14 runs")
    assert told in mechanics.sentence


ON_IMAGES, TUNED = {"preset": "digits", "hosts": ["resnet"]}, {"preset": "demo", "hosts": ["resnet", "transformer"]}
HERE = {"preset": "demo", "hosts": ["transformer"], "surrogate": False}


@pytest.mark.parametrize(
    ("zero_shot", "fine_tuned", "scratch", "outcome"),
    [
        (1.3, 1.19, 1.19, "met"),  # as good as one that was trained here alone
        (1.19, 1.3, 1.25, "met"),
        (1.19, 1.19, 1.1, "not met"),  # below the best size, but above that one
        (1.3, 1.25, 1.1, "not met"),
        (1.3, 1.2, 1.2, "cannot say"),
    ],
)
def test_a_policy_transfers_where_it_ends_below_the_best_size_and_not_above_one_trained_here(
    zero_shot, fine_tuned, scratch, outcome
):
    grown = {"ppo:zero-shot": zero_shot, "ppo:fine-tuned": fine_tuned, "ppo:scratch": scratch, "ppo:laws": 1.0}
    truth = SyntheticSweep(grown=grown | {"onejump": NO_MATCH})
    cards = {"ppo:zero-shot": ON_IMAGES, "ppo:fine-tuned": TUNED, "ppo:scratch": HERE}
    trained_on = {**cards, "ppo:laws": HERE | {"surrogate": True}}  # no match for a transferred one: it cost no runs
    transfer = judged(truth, policies=trained_on).criteria[2]
    assert transfer.outcome == outcome
    assert "ppo:fine-tuned, which has grown resnet and transformer:" in transfer.sentence
    assert "to ppo:scratch" in transfer.sentence
    assert "ppo:laws" not in transfer.sentence


def test_a_transferred_policy_has_to_beat_every_static_size_and_to_be_compared_with_one_from_here():
    cards = {"ppo:zero-shot": ON_IMAGES, "ppo:scratch": HERE}
    truth = SyntheticSweep(grown={"ppo:zero-shot": 1.19, "ppo:scratch": 1.19, "onejump": NO_MATCH})
    assert judged(truth, policies=cards).criteria[2].outcome == "met"
    for edits in ({"static-3": {"val_loss": 1.18}}, {("ppo:scratch", 3): FAILED}):
        assert judged(replace(truth, edits=edits), policies=cards).criteria[2].outcome == "cannot say"
    runs = [run for run in truth.runs() if run.arm != "static"]
    unknown = judged(truth, runs, truth.point(size=None), policies=cards).criteria[2]
    assert (unknown.outcome, "ppo:zero-shot, which has grown resnet: –" in unknown.sentence) == ("cannot say", True)


def test_nothing_is_said_of_transfer_where_no_arm_has_grown_another_kind_of_network():
    for trained_on in ({}, {"ppo": HERE}):
        transfer = judged(SyntheticSweep(grown={"ppo": 1.0, "onejump": NO_MATCH}), policies=trained_on).criteria[2]
        assert transfer.outcome == "cannot say"
        assert transfer.sentence == "No arm has learned on another kind of network."
