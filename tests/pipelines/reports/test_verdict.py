"""What a verdict says, on sweeps whose truth is known: `synthetic_sweeps` makes them up."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from esper.pipelines.reports.baselines import BASELINES
from esper.pipelines.reports.paired_tests import PairedTest, holm
from esper.pipelines.reports.runs import AXES, Run
from esper.pipelines.reports.verdict import Verdict, efficiency, judge

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_sweeps import BUDGET, SyntheticSweep, graft, own_tests, simulate

SWEEPS = 300
NOISE = 0.01
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
        interval = trials.tests("best static", axis)[0].interval
        assert interval is not None
        covered += abs(interval.mean - (1.23 - baseline)) <= (interval.half or 0)
    assert 0.93 <= covered / (2 * SWEEPS) <= 0.97


@pytest.mark.parametrize("sizes", [{2: 1.2, 3: 1.21}, {2: 1.2, 3: 1.21, 4: 1.21, 5: 1.21}])
def test_no_arm_that_equals_the_best_static_wins_more_often_than_it_may(sizes):
    """Five such arms, static sizes that two tuning seeds cannot tell apart, and any winner counts; so for the controls.

    The others are as far from the best as one run's noise: nearer, a wrong choice costs little; farther, it is rare.
    """
    sweep = five_equal(statics={1: 1.4} | sizes | {6: 1.4})
    won = better = controls = chosen = 0
    for trials in simulate(sweep, NOISE, SWEEPS):
        tests = own_tests(trials)
        won += efficiency(trials, tests, []).outcome == "met"
        ahead = {t.arm for t in tests if t.baseline == "best static" and t.outcome[0] == "better"}
        better += bool(ahead.intersection(trials.grown))
        controls += bool(ahead.intersection(trials.controls))
        chosen += trials.best_static != "static-2"
    assert chosen > SWEEPS / 10
    assert won <= better <= 0.05 * SWEEPS
    assert controls <= 0.05 * SWEEPS


def test_clear_winners_win_losers_lose_and_equals_tie():
    """Four standard deviations of the paired difference below the best size, at it, and as far above it."""
    clear = 4 * NOISE * 2**0.5
    arms = {"ppo": 1.2 - clear, "tamiyo": 1.2, "lag": 1.2, "random:ppo": 1.2, "openloop": 1.2 + clear}
    sweep = SyntheticSweep(grown=arms | {"onejump": NO_MATCH})
    won = lost = tied = 0
    for trials in simulate(sweep, NOISE, SWEEPS):
        tests = own_tests(trials)
        outcomes = {t.arm: t.outcome[0] for t in tests if t.baseline == "best static"}
        won += efficiency(trials, tests, []).outcome == "met" and outcomes["ppo"] == "better"
        lost += outcomes["openloop"] == "worse"
        tied += outcomes["tamiyo"] == "tie"
    assert won > 0.9 * SWEEPS
    assert lost > 0.9 * SWEEPS
    assert tied > 0.95 * SWEEPS


def test_holm_and_p_are_the_fields():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert not len(holm([]))
    differences = np.random.default_rng(3).normal(-0.3, 1, 5)
    assert PairedTest(differences).p == pytest.approx(2 * ttest_1samp(differences, 0, alternative="less").pvalue)
    assert PairedTest(-differences).p == 1


def test_better_among_many_arms_takes_more_than_an_interval_below_zero():
    test = PairedTest(np.array([-0.9, -0.1, -0.5, -1.1, -0.3]))
    assert 0.02 < test.p < 0.05
    assert replace(test, p_holm=test.p).outcome[0] == "better"
    said, reason = replace(test, p_holm=5 * test.p).outcome
    assert said == "tie"
    assert "all arms together" in reason


def test_nothing_is_said_of_fewer_than_five_pairs():
    verdict = judged(SyntheticSweep(grown=WINS, seeds=(1, 2, 3, 4)))
    assert {t.outcome[0] for t in verdict.tests} == {"cannot say"}
    assert "4 pairs, and a test takes 5" in found(verdict, "tamiyo").outcome[1]


def test_every_grown_arm_is_held_against_every_baseline_on_every_axis():
    sweep = five_equal()
    verdict = judged(sweep)
    held = {(t.arm, t.baseline, t.axis) for t in verdict.tests}
    every = {(arm, baseline, axis) for arm in sweep.grown for baseline in BASELINES for axis in AXES}
    assert held == {key for key in every if key[:2] != ("onejump", "best schedule")}
    against = [found(verdict, "tamiyo", baseline).against for baseline in BASELINES]
    assert against == ["static_final:tamiyo", "static-2", "onejump"]


def test_the_size_is_chosen_on_tuning_seeds_and_every_size_must_be_beaten():
    """On test seeds size 3 turns out lower than the size that tuning chose, and than the arm."""
    sweep = SyntheticSweep(grown={"tamiyo": 1.15, "onejump": NO_MATCH}, edits={"static-3": {"val_loss": 1.14}})
    test = found(judged(sweep), "tamiyo")
    assert (test.against, test.outcome[0]) == ("static-2", "tie")
    assert "every static size" in test.outcome[1]


def test_the_best_static_at_another_cost_is_another_size():
    even = {f"static-{n}": {"tokens": 1e9} for n in (1, 2, 3, 4)}
    statics = {1: 1.5, 2: 1.4, 3: 1.2, 4: 1.3}
    sweep = SyntheticSweep(statics=statics, grown={"tamiyo": 1.3}, cost=even | {"tamiyo": {"tokens": 0.75e9}})
    test = found(judged(sweep), "tamiyo", "best static", "tokens")
    assert test.against == "static-3"
    assert test.interval is not None
    assert test.interval.mean == pytest.approx(1.3 - (1.2 + sweep.slope * (0.75**-sweep.power - 1)), abs=1e-3)


@pytest.mark.parametrize(("loss", "said"), [(1.1, "cannot say"), (1.3, "worse")])
def test_beyond_all_that_a_baseline_was_trained_nothing_good_is_said(loss, said):
    cost = {"tamiyo": {"seconds": 9 * BUDGET}}
    sweep = SyntheticSweep(grown={"tamiyo": loss, "onejump": 1.2}, final_size=1.2, cost=cost)
    for baseline in BASELINES:
        test = found(judged(sweep), "tamiyo", baseline, "seconds")
        assert (test.outcome[0], test.interval, test.p) == (said, None, 1)
        assert test.outcome[1]


@pytest.mark.parametrize(("loss", "said"), [(1.3, "cannot say"), (1.6, "worse")])
def test_where_larger_sizes_were_never_trained_that_long_a_better_one_may_be_missing(loss, said):
    """At 0.8 of the smallest size's seconds only that size has losses; size 2 ended at half of them, at 1.2."""
    sweep = SyntheticSweep(grown={"tamiyo": loss, "onejump": 1.2}, cost={"tamiyo": {"seconds": 0.8 * BUDGET}})
    test = found(judged(sweep), "tamiyo", "best static", "seconds")
    assert (test.against, test.outcome[0]) == ("static-1", said)


@pytest.mark.parametrize(("overshoot", "said"), [(0.981, "tie"), (1.019, "tie"), (1.03, "cannot say")])
def test_an_overshoot_of_the_budget_is_no_other_cost(overshoot, said):
    sweep = SyntheticSweep(cost={"tamiyo": {OWN: overshoot * BUDGET}})
    test = found(judged(sweep), "tamiyo")
    assert test.outcome[0] == said
    assert said != "tie" or abs(test.differences.mean()) < 1e-3


def test_an_arm_that_diverged_once_is_worse_however_low_the_rest():
    sweep = SyntheticSweep(grown={"ppo": 1.0, "onejump": 1.3}, edits={("ppo", 3): DIVERGED})
    verdict = judged(sweep)
    test = found(verdict, "ppo")
    assert (test.outcome, len(test.differences)) == (("worse", "ppo diverged on seed 3"), 4)
    efficient, mechanics = verdict.criteria
    assert (efficient.outcome, mechanics.outcome) == ("not met", "not met")
    assert "1 run that had grown diverged (ppo on seed 3)" in mechanics.sentence
    verdict = judged(replace(sweep, edits={"ppo": DIVERGED}))
    assert (outcome(verdict, "ppo"), found(verdict, "ppo").interval) == ("worse", None)


@pytest.mark.parametrize("edit", [{("static-2", 3): DIVERGED}, {("ppo", 3): {"status": "FAILED"}}])
def test_a_seed_without_a_loss_is_left_out_and_named(edit):
    sweep = SyntheticSweep(grown={"ppo": 1.0, "onejump": 1.3}, seeds=(1, 2, 3, 4, 5, 6), edits=edit)
    verdict, [(label, _)] = judged(sweep), edit
    test = found(verdict, "ppo")
    assert (test.outcome, len(test.differences)) == (("better", f"{label} has no loss on seed 3"), 5)
    failed = label == "ppo"
    assert verdict.criteria[0].withheld == (("1 trial without a result (ppo-3: failed).",) if failed else ())


@pytest.mark.parametrize(("label", "baseline"), [("static_final:tamiyo", "final size"), ("onejump", "best schedule")])
def test_a_baseline_that_was_not_run_cannot_be_beaten(label, baseline):
    sweep = SyntheticSweep(grown=WINS)
    verdict = judged(sweep, [run for run in sweep.runs() if run.label != label])
    test = found(verdict, "tamiyo", baseline)
    assert (test.outcome[0], test.against) == ("cannot say", None)
    assert verdict.criteria[0].outcome == "cannot say"


def test_a_shape_that_is_a_static_size_is_held_against_that_size():
    sweep = SyntheticSweep(grown=WINS, edits={"tamiyo": {"parameters": 2000}})  # as static-2 has
    runs = [run for run in sweep.runs() if run.label != "static_final:tamiyo"]
    assert found(judged(sweep, runs), "tamiyo", "final size").against == "static-2"
    runs = [
        replace(run, summary=run.summary | {"parameters": 3000} if run.name == "tamiyo-1" else run.summary)
        for run in runs
    ]
    assert found(judged(sweep, runs), "tamiyo", "final size").against is None


def test_an_arm_that_never_grew_cannot_win_and_is_told():
    """It ends below everything, for its rate was another one; and beside it none has grown."""
    sweep = SyntheticSweep(grown=WINS, idle=("tamiyo",))
    verdict = judged(sweep)
    assert verdict.trials.idle == {"tamiyo": None}
    assert "tamiyo" not in {test.arm for test in verdict.tests}
    assert verdict.criteria[0].outcome == "not met"
    assert "tamiyo did not grow" in verdict.criteria[0].sentence
    none, mechanics = judged(replace(sweep, idle=("tamiyo", "onejump"))).criteria
    assert (none.outcome, mechanics.outcome) == ("cannot say", "cannot say")
    assert none.sentence.startswith("At 1,000,000 parameter-seconds no arm grew; tamiyo did not grow; onejump did not")


def test_an_arm_that_grew_on_too_few_seeds_cannot_win():
    sweep = SyntheticSweep(grown=WINS, edits={("tamiyo", 3): {"grafts": []}})
    verdict = judged(sweep)
    assert found(verdict, "tamiyo").outcome == ("cannot say", "it grew on 4 seeds only, and a test takes 5")
    assert verdict.criteria[0].outcome == "cannot say"


def test_runs_that_are_a_static_size_to_the_bit_count_as_that_size():
    sweep = SyntheticSweep(grown=WINS | {"lag": 1.3, "random:tamiyo": 1.3}, idle=("lag", "random:tamiyo"))
    runs = sweep.runs()
    of = {run.seed: run for run in runs if run.label == "static-3" and run.purpose == "test"}
    runs = [
        replace(of[run.seed], label=run.label, arm=run.arm) if run.label == "lag" and run.seed < 9 else run
        for run in runs
    ]
    verdict = judged(sweep, runs)
    assert verdict.trials.idle == {"lag": "static-3", "random:tamiyo": None}
    assert "lag did not grow: its runs are those of static-3 to the bit" in verdict.criteria[0].sentence


def test_equal_runs_tie_on_every_axis():
    """To the bit: whatever else would stand in the way of a comparison."""
    sweep = SyntheticSweep(grown={"tamiyo": 1.3, "onejump": 1.3}, seeds=(1, 2))
    runs = sweep.runs()
    of = {run.seed: run for run in runs if run.label == "onejump"}
    runs = [replace(of[run.seed], label=run.label, arm=run.arm) if run.label == "tamiyo" else run for run in runs]
    verdict = judged(sweep, runs)
    assert {outcome(verdict, "tamiyo", "best schedule", axis) for axis in AXES} == {"tie"}


FAILED = {"label": "lag", "grid": "{}", "status": "failed"}
CAVEATS: dict[str, Callable[[dict, dict], Any]] = {
    "only 4 test seeds": lambda point, sweep: sweep.update(seeds=[1, 2, 3, 4]),
    "2 layers (chosen and best on the test seeds), is at the edge": lambda point, sweep: sweep.update(sizes=[2, 3, 4]),
    "4 layers (chosen), is at the edge": lambda point, sweep: point.update(size=4),
    "1 layer (chosen), is the smallest there is": lambda point, sweep: point.update(size=1),
    "rates of the static sizes were not tuned": lambda point, sweep: sweep.update(rates_tuned=False),
    "chosen on the test seeds, not on tuning seeds": lambda point, sweep: sweep.update(tuning_seeds=[]),
    "size or schedule was chosen on the test": lambda point, sweep: point.update(size=None),
    "schedule was chosen on the test": lambda point, sweep: point.update(schedule=None),
    "1 trial without a result (lag-7: failed)": lambda point, sweep: sweep.update(trials={"lag-7": FAILED}),
    "(lag-8: missing)": lambda point, sweep: sweep.update(trials={"lag-8": FAILED | {"status": "missing"}}),
    "(lag-9: not in MLflow)": lambda point, sweep: sweep.update(trials={"lag-9": FAILED | {"status": "done"}}),
    "31 runs ended more than 2% off the budget": lambda point, sweep: point["budget"].update(amount=1.03 * BUDGET),
}


@pytest.mark.parametrize("said", CAVEATS)
def test_a_caveat_is_said_when_it_holds_alone_and_withholds_the_verdict(said):
    truth = SyntheticSweep(grown=WINS)
    point, sweep = truth.point(), truth.sweep()
    CAVEATS[said](point, sweep)
    efficient, mechanics = judge(truth.runs(), point, sweep).criteria
    if "31 runs" in said:
        said = f"{len([r for r in truth.runs() if r.purpose == 'test'])} runs ended more than 2% off the budget"
    [caveat] = efficient.withheld
    assert said in caveat
    assert efficient.outcome == "withheld"
    assert efficient.sentence.startswith("By the numbers alone, at 1,0")
    assert "tamiyo ends lower than all baselines" in efficient.sentence
    assert (mechanics.outcome, mechanics.withheld) == ("met", ())


def test_nothing_is_withheld_when_nothing_is_wrong():
    truth = SyntheticSweep(grown=WINS)
    elsewhere = {"lag-9": FAILED | {"grid": '{"budget.amount": 1}'}, "tamiyo-1": FAILED | {"status": "done"}}
    assert judged(truth, trials=elsewhere).criteria[0].outcome == "met"


def test_measured_budgets_are_equal_only_if_they_give_equal_work():
    truth = SyntheticSweep(grown=WINS, edits={("static-2", 4): {"steps": 94}})
    [caveat] = judged(truth).criteria[0].withheld
    assert "Equal measured budgets gave static-2 from 94 to 100 steps, more than 5% apart" in caveat
    assert judged(replace(truth, edits={("static-2", 4): {"steps": 96}})).criteria[0].outcome == "met"


def test_un_annealed_points_and_other_runs_change_nothing():
    """Losses of mid-run, of runs that diverged, of rate trials and of another grid point."""
    sweep = five_equal(edits={("ppo", 2): DIVERGED})
    before = judged(sweep).as_dict()
    runs = five_equal(edits={("ppo", 2): DIVERGED | {"val_loss": -100.0}}).runs()
    for run in runs:
        run.summary["val_curve"] = [point | {"val_loss": -50.0} for point in run.summary["val_curve"]]
    for change in ({"purpose": "rates"}, {"grid": '{"budget.amount": 1}'}):
        runs += [replace(run, **change, summary=run.summary | {"val_loss": -1.0}) for run in sweep.runs()]
    assert judged(sweep, runs).as_dict() == before


def test_of_two_runs_of_a_trial_the_one_that_ended_counts():
    sweep = five_equal()
    again = [replace(run, run_id="x", status="FAILED", summary={}) for run in sweep.runs()]
    assert judged(sweep, [*sweep.runs(), *again]).as_dict() == judged(sweep, [*again, *sweep.runs()]).as_dict()
    assert judged(sweep, [*sweep.runs(), *again]).tests[0].outcome[0] == "better"


def test_efficiency_names_the_winner_and_the_lowest():
    sweep = SyntheticSweep(grown={"ppo": 1.1, "tamiyo": 1.2, "lag": 1.3, "onejump": 1.25})
    verdict = judged(sweep)
    efficient = verdict.criteria[0]
    assert efficient.outcome == "met"
    assert efficient.sentence.startswith(
        "At 1,000,000 parameter-seconds ppo ends lower than all baselines; of the grown"
    )
    assert "ppo ends lowest: -0.1000 ±" in efficient.sentence
    assert [outcome(verdict, arm) for arm in ("ppo", "tamiyo", "lag")] == ["better", "tie", "worse"]


@pytest.mark.parametrize("beaten_by", BASELINES)
def test_a_winner_has_to_win_against_all_three(beaten_by):
    sweep = SyntheticSweep(
        statics={1: 1.4, 2: 1.0 if beaten_by == "best static" else 1.2, 3: 1.25, 4: 1.4},
        grown={"ppo": 1.1, "onejump": 1.1 if beaten_by == "best schedule" else 1.3},
        final_size=1.0 if beaten_by == "final size" else 1.3,
    )
    verdict = judged(sweep)
    assert verdict.criteria[0].outcome == (
        "met" if beaten_by == "best schedule" else "not met"
    )  # by the schedule itself
    winner = "onejump ends lower than all" if beaten_by == "best schedule" else "no grown arm ends lower than all"
    assert winner in verdict.criteria[0].sentence
    assert outcome(verdict, "ppo", beaten_by) in ("worse", "tie")


def test_a_control_that_beats_all_does_not_win():
    """Nor does it make the correction for the others any stricter."""
    alone = SyntheticSweep(grown={"tamiyo": 1.2, "onejump": 1.3})
    verdict = judged(replace(alone, grown=alone.grown | {"random:tamiyo": 1.0}))
    assert verdict.criteria[0].outcome == "not met"
    tests = [found(verdict, "random:tamiyo", baseline) for baseline in BASELINES]
    assert {test.outcome[0] for test in tests} == {"better"}
    assert all(test.p_holm == test.p for test in tests)  # a family of one
    family = [found(verdict, arm) for arm in alone.grown]
    assert [test.p_holm for test in family] == holm([test.p for test in family]).tolist()


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
    runs = [run for run in sweep.runs() if run.arm != "static"]
    verdict = judged(sweep, runs, sweep.point(size=None), sizes=[])
    assert verdict.trials.best_static is None
    assert {t.outcome[0] for t in verdict.tests if t.baseline == "best static"} == {"cannot say"}


@pytest.mark.parametrize(
    ("change", "said", "told"),
    [
        (
            {},
            "met",
            "moved the validation loss by at most 1.0e-06 nats; none of them was rolled back; no runs that had",
        ),
        ({"val_loss_after": 1.5009}, "met", "9.0e-04"),
        ({"val_loss_after": 1.4985}, "not met", "1.5e-03"),
        ({"val_loss_after": np.nan}, "not met", "inf"),
        ({"outcome": "rolled back"}, "not met", "1 of them was rolled back"),
    ],
)
def test_mechanics_is_met_when_no_graft_did_harm_whoever_chose_it(change, said, told):
    sweep = SyntheticSweep(grown={"tamiyo": 1.2, "random:tamiyo": 1.3})
    sweep.edits = {("random:tamiyo", 2): {"grafts": [graft(**change)]}}
    mechanics = judged(sweep).criteria[1]
    assert mechanics.outcome == said
    assert told in mechanics.sentence
    assert mechanics.sentence.startswith("14 grafts on 14 runs")


@pytest.mark.parametrize(
    ("label", "grafts", "said"), [("random:tamiyo", 1, "not met"), ("random:tamiyo", 0, "met"), ("static-1", 0, "met")]
)
def test_a_run_that_diverged_counts_against_growing_only_if_it_grew(label, grafts, said):
    sweep = SyntheticSweep(grown={"tamiyo": 1.2, "random:tamiyo": 1.3, "onejump": 1.3})
    sweep.edits = {(label, 2): DIVERGED | {"grafts": [graft()] * grafts}}
    mechanics = judged(sweep).criteria[1]
    assert mechanics.outcome == said
    assert f"({label} on seed 2)" in mechanics.sentence
    assert ("1 run that had not grown did" in mechanics.sentence) == (not grafts)
