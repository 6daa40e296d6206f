"""What a verdict says, on sweeps whose truth is known: `synthetic_sweeps` makes them up.

Alone: `pytest tests/pipelines/reports/test_verdict.py`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from esper.pipelines.reports.claims import Claim, Pairs, holm
from esper.pipelines.reports.criteria import efficiency
from esper.pipelines.reports.opponents import OPPONENTS
from esper.pipelines.reports.tables import AXES, Tables
from esper.pipelines.reports.verdict import Verdict, judge

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_sweeps import BUDGET, SyntheticSweep, own_claims, simulate

SWEEPS = 1000
NOISE = 0.01
OWN = "parameter_seconds"
NO_MATCH = 1.6  # a loss that any arm gets below


def five_equal(**changes: Any) -> SyntheticSweep:
    """Five arms and two controls that equal the envelope, and a schedule that is no match."""
    arms = dict.fromkeys(("tamiyo", "lag", "ppo", "openloop", "gradual", "random:tamiyo", "random:ppo"), 1.2)
    return SyntheticSweep(grown=arms | {"onejump": NO_MATCH}, **changes)


def noise(sweep: SyntheticSweep, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, NOISE, len(sweep.tables().finals))


def judged(sweep: SyntheticSweep, tables: Tables | None = None, **changes: Any) -> Verdict:
    """The verdict on a sweep; `changes` go into `sweep.json`."""
    tables = tables or sweep.tables(noise(sweep) / 100)
    return judge(tables, sweep.point(), sweep=sweep.sweep() | changes)


def claim(verdict: Verdict, arm: str, opponent: str = "envelope", axis: str = OWN) -> Claim:
    [found] = [c for c in verdict.claims if (c.arm, c.opponent, c.axis) == (arm, opponent, axis)]
    return found


def edited(tables: Tables, label: str, seed: int | None = None, **values: Any) -> Tables:
    """The tables with other values in `finals` for a label's test runs, or for one of them."""
    finals = tables.finals.copy()
    rows = (finals["label"] == label) & (finals["purpose"] == "test")
    if seed is not None:
        rows &= finals["seed"] == seed
    for column, value in values.items():
        finals.loc[rows, column] = value
    return Tables(tables.curves, finals, tables.timeline)


# -- Rates over many sweeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "share"), [(OWN, 1.0), ("flops", 0.6)])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(axis, share):
    """On the budget's axis and, interpolated between two annealed points, on another; size 2 is always the choice."""
    even = {f"static-{n}": {"flops": 1e12} for n in (1, 2, 3, 4)}
    sweep = SyntheticSweep(grown={"tamiyo": 1.23, "onejump": NO_MATCH}, cost=even | {"tamiyo": {"flops": share * 1e12}})
    low, high = (1.2 + sweep.slope * (at**-sweep.power - 1) for at in (0.5, 0.75))
    opponent = low + (high - low) * np.log(share / 0.5) / np.log(1.5) if axis == "flops" else 1.2
    covered = 0
    for bench in simulate(sweep, NOISE, SWEEPS):
        found, _ = bench.claims("envelope", axis)
        assert found.interval is not None
        covered += abs(found.interval.mean - (1.23 - opponent)) <= (found.interval.half or 0)
    assert 0.93 <= covered / SWEEPS <= 0.97


@pytest.mark.parametrize("sizes", [{2: 1.2, 3: 1.21}, {2: 1.2, 3: 1.21, 4: 1.21, 5: 1.21}])
def test_no_arm_that_equals_the_envelope_wins_more_often_than_it_may(sizes):
    """Five such arms, static sizes that two tuning seeds cannot tell apart, and any winner counts; so for the controls.

    The others are as far from the best as one run's noise: nearer, a wrong choice costs little; farther, it is rare.
    """
    sweep = five_equal(statics={1: 1.4} | sizes | {6: 1.4})
    won = better = controls = chosen = 0
    for bench in simulate(sweep, NOISE, SWEEPS):
        claims = own_claims(bench)
        won += efficiency(bench, claims, []).outcome == "met"
        ahead = {c.arm for c in claims if c.opponent == "envelope" and c.outcome == "better"}
        better += bool(ahead.intersection(bench.grown))
        controls += bool(ahead.intersection(bench.controls))
        chosen += bench.size != 2
    assert chosen > SWEEPS / 10
    assert won <= better <= 0.05 * SWEEPS
    assert controls <= 0.05 * SWEEPS


def test_clear_winners_win_losers_lose_and_equals_tie():
    """Four standard deviations of the paired difference below the best size, at it, and as far above it."""
    clear = 4 * NOISE * 2**0.5
    arms = {"ppo": 1.2 - clear, "tamiyo": 1.2, "lag": 1.2, "random:ppo": 1.2, "openloop": 1.2 + clear}
    sweep = SyntheticSweep(grown=arms | {"onejump": NO_MATCH})
    won = lost = tied = 0
    for bench in simulate(sweep, NOISE, SWEEPS):
        claims = own_claims(bench)
        outcomes = {c.arm: c.outcome for c in claims if c.opponent == "envelope"}
        won += efficiency(bench, claims, []).outcome == "met" and outcomes["ppo"] == "better"
        lost += outcomes["openloop"] == "worse"
        tied += outcomes["tamiyo"] == "tie"
    assert won > 0.9 * SWEEPS
    assert lost > 0.9 * SWEEPS
    assert tied > 0.95 * SWEEPS


def test_what_is_simulated_is_what_judge_does():
    sweep = five_equal()
    drawn = next(simulate(sweep, NOISE, 1))
    shift = np.random.default_rng(20260101).normal(0, NOISE, len(sweep.tables().finals))
    verdict = judge(sweep.tables(shift), sweep.point(drawn.size), sweep=sweep.sweep())
    assert [c for c in verdict.claims if c.axis == OWN] == own_claims(drawn)


# -- One claim ---------------------------------------------------------------------------------------------------


def test_holm_is_holms():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert not len(holm([]))


def test_p_is_that_of_the_paired_t_test():
    differences = np.random.default_rng(3).normal(-0.3, 1, 5)
    assert Pairs(differences).p == pytest.approx(2 * ttest_1samp(differences, 0, alternative="less").pvalue)
    assert Pairs(-differences).p == 1


def test_better_among_many_arms_takes_more_than_an_interval_below_zero():
    shift = np.array([-0.9, -0.1, -0.5, -1.1, -0.3])
    pairs = Pairs(shift)
    assert 0.02 < pairs.p < 0.05
    assert pairs.outcome(pairs.p)[0] == "better"
    outcome, interval, reason = pairs.outcome(5 * pairs.p)
    assert outcome == "tie"
    assert interval is not None
    assert "all arms together" in reason


def test_an_arm_that_never_grew_ties_with_its_own_size_to_the_bit():
    sweep = five_equal()
    tables = sweep.tables()  # without noise, all differences are 0
    assert claim(judged(sweep, tables), "tamiyo").outcome == "tie"
    assert claim(judged(sweep, tables), "tamiyo").interval is not None


def test_every_grown_arm_is_held_against_every_opponent_on_every_axis():
    sweep = five_equal()
    verdict = judged(sweep)
    held = {(c.arm, c.opponent, c.axis) for c in verdict.claims}
    assert held == {
        (arm, opponent, axis)
        for arm in sweep.grown
        for opponent in OPPONENTS
        for axis in AXES
        if (arm, opponent) != ("onejump", "schedule")
    }
    assert claim(verdict, "tamiyo", "final size").against == "static_final:tamiyo"
    assert claim(verdict, "tamiyo", "schedule").against == "onejump"
    assert claim(verdict, "tamiyo").against == "static-2"


def test_the_size_is_chosen_on_tuning_seeds_and_every_size_must_be_beaten():
    """On test seeds size 3 turns out lower than the size that tuning chose, and than the arm."""
    sweep = SyntheticSweep(grown={"tamiyo": 1.15, "onejump": NO_MATCH})
    tables = edited(sweep.tables(noise(sweep) / 100), "static-3", val_loss=1.14)
    found = claim(judged(sweep, tables), "tamiyo")
    assert (found.against, found.outcome) == ("static-2", "not better")
    assert "static-3 ends as low or lower" in found.reason
    tables = edited(tables, "static-3", val_loss=1.1500001)
    found = claim(judged(sweep, tables), "tamiyo")
    assert found.outcome == "tie"
    assert "every static size" in found.reason


def test_the_envelope_at_another_cost_is_another_size():
    even = {f"static-{n}": {"tokens": 1e9} for n in (1, 2, 3, 4)}
    sweep = SyntheticSweep(
        statics={1: 1.5, 2: 1.4, 3: 1.2, 4: 1.3}, grown={"tamiyo": 1.3}, cost=even | {"tamiyo": {"tokens": 0.75e9}}
    )
    verdict = judge(sweep.tables(noise(sweep) / 100), sweep.point(2), sweep=sweep.sweep())
    found = claim(verdict, "tamiyo", axis="tokens")
    assert found.against == "static-3"
    assert found.interval is not None
    expected = 1.3 - (1.2 + sweep.slope * (0.75**-sweep.power - 1))
    assert found.interval.mean == pytest.approx(expected, abs=1e-3)


# -- Censored ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "outcome"), [(1.1, "cannot say"), (1.3, "not better")])
def test_beyond_all_that_an_opponent_was_trained_nothing_good_is_said(loss, outcome):
    """Unless the opponent was as low at a lower cost: then the arm is not better for certain."""
    sweep = SyntheticSweep(
        grown={"tamiyo": loss, "onejump": 1.2}, final_size=1.2, cost={"tamiyo": {"seconds": 9 * BUDGET}}
    )
    verdict = judged(sweep)
    for opponent in OPPONENTS:
        found = claim(verdict, "tamiyo", opponent, "seconds")
        assert (found.outcome, found.interval, found.p) == (outcome, None, 1)
        assert found.reason


def test_below_all_annealed_points_nothing_is_said():
    sweep = SyntheticSweep(grown={"tamiyo": 1.0, "onejump": 1.2}, cost={"tamiyo": {"flops": 1e9}})
    found = claim(judged(sweep), "tamiyo", "schedule", "flops")
    assert found.outcome == "cannot say"
    assert "so low a cost" in found.reason


@pytest.mark.parametrize(("loss", "outcome"), [(1.0, "cannot say"), (1.3, "not better"), (1.6, "worse")])
def test_where_larger_sizes_were_never_trained_that_long_the_envelope_may_lie_lower(loss, outcome):
    """At 0.8 of the smallest size's seconds only that size has losses; size 2 ended at half of them, at 1.2."""
    sweep = SyntheticSweep(grown={"tamiyo": loss, "onejump": 1.2}, cost={"tamiyo": {"seconds": 0.8 * BUDGET}})
    found = claim(judged(sweep), "tamiyo", axis="seconds")
    assert (found.against, found.outcome) == ("static-1", outcome)


@pytest.mark.parametrize("overshoot", [0.981, 1.019])
def test_an_overshoot_of_the_budget_is_no_other_cost(overshoot):
    sweep = SyntheticSweep(cost={"tamiyo": {OWN: overshoot * BUDGET}})
    found = claim(judged(sweep), "tamiyo")
    assert found.outcome == "tie"
    assert found.interval is not None
    assert found.interval.mean == pytest.approx(0, abs=1e-3)
    far = SyntheticSweep(cost={"tamiyo": {OWN: 1.03 * BUDGET}}, grown={"tamiyo": 1.1, "onejump": 1.3})
    assert claim(judged(far), "tamiyo").outcome == "cannot say"


def test_an_arm_that_diverged_once_is_not_better_however_low_the_rest():
    sweep = SyntheticSweep(grown={"ppo": 1.0, "onejump": 1.3})
    tables = edited(sweep.tables(noise(sweep)), "ppo", seed=3, diverged=True, val_loss=99.0)
    verdict = judged(sweep, tables)
    found = claim(verdict, "ppo")
    assert (found.outcome, found.seeds) == ("not better", 4)
    assert found.reason == "ppo diverged on seed 3"
    [row] = [row for row in verdict.rows if row.label == "ppo"]
    assert (row.seeds, row.diverged, sorted(row.losses)) == (4, 1, [1, 2, 4, 5])
    assert verdict.criteria[0].outcome == "not met"
    assert "ppo on seed 3" in verdict.criteria[0].sentence
    assert verdict.criteria[1].outcome == "not met"
    found = claim(judged(sweep, edited(tables, "ppo", diverged=True)), "ppo")
    assert (found.outcome, found.seeds, found.interval) == ("not better", 0, None)


def test_an_opponent_that_diverged_leaves_its_pair_out():
    sweep = SyntheticSweep(grown={"ppo": 1.0, "onejump": 1.3})
    tables = edited(sweep.tables(noise(sweep)), "static-2", seed=3, diverged=True)
    found = claim(judged(sweep, tables), "ppo")
    assert (found.outcome, found.seeds, found.reason) == ("better", 4, "static-2 diverged on seed 3")


def test_a_failed_trial_leaves_its_pair_out_and_withholds_the_verdict():
    sweep = SyntheticSweep(grown={"ppo": 1.0, "onejump": 1.3})
    tables = edited(sweep.tables(noise(sweep)), "ppo", seed=3, status="FAILED", val_loss=np.nan)
    verdict = judged(sweep, tables)
    found = claim(verdict, "ppo")
    assert (found.outcome, found.seeds, found.reason) == ("better", 4, "ppo failed on seed 3")
    assert verdict.caveats == ("1 trial(s) have no result: ppo-3 (failed).",)
    assert verdict.criteria[1].outcome == "withheld"


def test_seeds_that_only_one_of_two_has_are_left_out_and_named():
    sweep = SyntheticSweep(grown={"ppo": 1.0, "onejump": 1.3})
    tables = sweep.tables(noise(sweep))
    finals = tables.finals
    gone = ((finals["label"] == "ppo") & (finals["seed"] == 1)) | (
        (finals["label"] == "static-2") & (finals["seed"] == 5)
    )
    found = claim(judged(sweep, Tables(tables.curves, finals[~gone], tables.timeline)), "ppo")
    assert found.seeds == 3
    assert found.reason == "ppo has no run on seed 1; static-2 has no run on seed 5"


@pytest.mark.parametrize("seeds", [1, 0])
def test_fewer_than_two_pairs_say_nothing(seeds):
    sweep = SyntheticSweep(grown={"ppo": 1.0, "onejump": 1.3})
    tables = sweep.tables(noise(sweep))
    finals = tables.finals
    gone = (finals["label"] == "static-2") & (finals["purpose"] == "test") & (finals["seed"] > seeds)
    found = claim(judged(sweep, Tables(tables.curves, finals[~gone], tables.timeline)), "ppo")
    assert (found.outcome, found.interval) == ("cannot say", None)
    assert found.reason


@pytest.mark.parametrize(("label", "opponent"), [("static_final:tamiyo", "final size"), ("onejump", "schedule")])
def test_an_opponent_that_was_not_run_cannot_be_beaten(label, opponent):
    sweep = SyntheticSweep(grown={"tamiyo": 1.0, "onejump": 1.3})
    tables = sweep.tables(noise(sweep))
    tables = Tables(tables.curves, tables.finals[tables.finals["label"] != label], tables.timeline)
    verdict = judged(sweep, tables)
    found = claim(verdict, "tamiyo", opponent)
    assert (found.outcome, found.against) == ("cannot say", None)
    assert verdict.criteria[1].outcome == "cannot say"


def test_a_shape_that_is_a_static_size_is_held_against_that_size():
    sweep = SyntheticSweep(grown={"tamiyo": 1.0, "onejump": 1.3})
    tables = sweep.tables(noise(sweep))
    finals = tables.finals[tables.finals["label"] != "static_final:tamiyo"].copy()
    finals.loc[finals["label"] == "tamiyo", "parameters"] = 2000  # as static-2 has
    assert (
        claim(judged(sweep, Tables(tables.curves, finals, tables.timeline)), "tamiyo", "final size").against
        == "static-2"
    )
    finals.loc[(finals["label"] == "tamiyo") & (finals["seed"] == sweep.seeds[0]), "parameters"] = 3000
    assert claim(judged(sweep, Tables(tables.curves, finals, tables.timeline)), "tamiyo", "final size").against is None


# -- Caveats -----------------------------------------------------------------------------------------------------

FAILED = {"label": "lag", "grid": "{}", "status": "failed"}
CAVEATS: dict[str, Callable[[dict, dict], Any]] = {
    "only 4 test seeds": lambda point, sweep: sweep.update(seeds=[1, 2, 3, 4]),
    "2 (chosen and best on the test seeds), is at the edge": lambda point, sweep: sweep.update(sizes=[2, 3, 4]),
    "size, 4 (chosen), is at the edge": lambda point, sweep: point.update(size=4),
    "rates of the static sizes were not tuned": lambda point, sweep: sweep.update(rates_tuned=False),
    "outside the preset's range, 10 to 100": lambda point, sweep: point["spec"]["budget"].update(interior=[10, 100]),
    "does not say on which budgets": lambda point, sweep: point["spec"]["budget"].update(interior=None),
    "not chosen on tuning seeds": lambda point, sweep: sweep.update(tuning_seeds=[]),
    "size or schedule was not chosen": lambda point, sweep: point.update(size=None),
    "schedule was not chosen": lambda point, sweep: point.update(schedule=None),
    "1 trial(s) have no result: lag-7 (failed)": lambda point, sweep: sweep["trials"].update({"lag-7": FAILED}),
    "lag-8 (missing)": lambda point, sweep: sweep["trials"].update({"lag-8": FAILED | {"status": "missing"}}),
}


@pytest.mark.parametrize("said", CAVEATS)
def test_a_caveat_is_said_when_it_holds_alone_and_withholds_the_verdict(said):
    truth = SyntheticSweep(grown={"tamiyo": 1.0, "onejump": 1.3})
    point, sweep = truth.point(), truth.sweep()
    CAVEATS[said](point, sweep)
    verdict = judge(truth.tables(noise(truth)), point, sweep=sweep)
    [caveat] = verdict.caveats
    assert said in caveat
    mechanics, efficient, _ = verdict.criteria
    assert (efficient.outcome, efficient.withheld) == ("withheld", (caveat,))
    assert efficient.sentence.startswith("By the numbers alone, at 1,000,000 parameter-seconds tamiyo ends lower")
    assert efficient.details[0].startswith("tamiyo is better than")
    assert (mechanics.outcome, mechanics.withheld) == ("met", ())


def test_nothing_is_withheld_when_nothing_is_wrong():
    truth = SyntheticSweep(grown={"tamiyo": 1.0, "onejump": 1.3})
    elsewhere = {"lag-9": FAILED | {"grid": '{"budget.amount": 1}'}, "tamiyo-1": FAILED | {"status": "done"}}
    for interior in ([BUDGET, 2 * BUDGET], [1, BUDGET]):
        point = truth.point() | {"spec": {"budget": {"interior": interior}}}
        verdict = judge(truth.tables(noise(truth)), point, sweep=truth.sweep() | {"trials": elsewhere})
        assert verdict.caveats == ()
        assert verdict.criteria[1].outcome == "met"


def test_a_trial_that_is_done_and_not_in_mlflow_is_told():
    truth = SyntheticSweep()
    [caveat] = judged(truth, trials={"lag-1": FAILED | {"status": "done"}}).caveats
    assert caveat == "1 trial(s) have no result: lag-1 (not in MLflow)."


def test_many_trials_without_a_result_are_counted_and_a_few_named():
    truth = SyntheticSweep()
    [caveat] = judged(truth, trials={f"lag-{i}": FAILED for i in range(7)}).caveats
    assert caveat.startswith("7 trial(s) have no result: lag-0 (failed)")
    assert caveat.endswith("lag-4 (failed), ….")


# -- What is not looked at ---------------------------------------------------------------------------------------


def test_un_annealed_points_and_other_runs_change_nothing():
    """Losses of mid-run, of runs that diverged, of rate trials and of another grid point."""
    sweep = five_equal()
    tables = edited(sweep.tables(noise(sweep)), "ppo", seed=2, diverged=True)
    before = judged(sweep, tables).as_dict()
    curves, finals = tables.curves.copy(), tables.finals.copy()
    curves.loc[curves["kind"] == "decision", "val_loss"] = np.random.default_rng(1).normal(0, 100, len(curves) // 2)
    lost = (finals["label"] == "ppo") & (finals["seed"] == 2)
    finals.loc[lost, "val_loss"] = -100.0
    curves.loc[curves["run_id"].isin(finals.loc[lost, "run_id"]), "val_loss"] = -100.0
    others = []
    for change in ({"purpose": "rates"}, {"grid": '{"budget.amount": 1}'}):
        both = [frame.assign(**change, val_loss=-1.0, run_id="x" + frame["run_id"]) for frame in (curves, finals)]
        others.append(both)
    curves = pd.concat([curves, *(pair[0] for pair in others)])
    finals = pd.concat([finals, *(pair[1] for pair in others)])
    assert judged(sweep, Tables(curves, finals, tables.timeline)).as_dict() == before


def test_a_verdict_is_json():
    sweep = five_equal()
    tables = edited(sweep.tables(noise(sweep)), "lag", diverged=True, wall_seconds=np.nan)
    told = json.loads(json.dumps(judged(sweep, tables).as_dict(), allow_nan=False))
    assert [criterion["criterion"] for criterion in told["criteria"]] == ["Mechanics", "Efficiency", "Transfer"]
    assert set(told["envelope"]) == set(AXES)
    assert told["claims"][0]["interval"].keys() == {"mean", "half_width_95"}


# -- Criteria and rows -------------------------------------------------------------------------------------------


def test_rows_hold_every_label_statics_first():
    sweep = SyntheticSweep(statics={3: 1.25, 1: 1.4, 2: 1.2}, grown={"tamiyo": 1.3, "onejump": 1.3})
    verdict = judged(sweep)
    assert [row.label for row in verdict.rows] == [
        *("static-1", "static-2", "static-3", "tamiyo", "onejump", "static_final:tamiyo", "static_final:onejump"),
    ]
    rows = {row.label: row for row in verdict.rows}
    assert rows["static-2"].difference is None
    assert rows["static-3"].difference is not None
    assert rows["static-3"].difference.mean == pytest.approx(0.05, abs=1e-3)
    assert rows["static-3"].outcome is None
    assert rows["tamiyo"].outcome == "worse"
    assert rows["tamiyo"].difference == claim(verdict, "tamiyo").interval
    assert (rows["static-1"].size, rows["tamiyo"].size) == (1, None)
    assert rows["tamiyo"].cost == pytest.approx(sweep.final_cost("tamiyo"))
    assert (rows["tamiyo"].grafts, rows["tamiyo"].parameters, rows["tamiyo"].wall_seconds) == (1, 999, 9)
    assert sorted(rows["tamiyo"].losses) == [1, 2, 3, 4, 5]


def test_efficiency_names_winners_ties_and_losers():
    sweep = SyntheticSweep(grown={"ppo": 1.1, "tamiyo": 1.2, "lag": 1.3, "onejump": 1.25})
    _, efficient, transfer = judged(sweep, sweep.tables(noise(sweep) / 10)).criteria
    assert efficient.outcome == "met"
    assert efficient.sentence.startswith(
        "At 1,000,000 parameter-seconds ppo ends lower than all of its opponents; its "
    )
    assert "minus that of a static one of its final size (static_final:ppo) is -0.4" in efficient.sentence
    assert "minus that of the best fixed schedule (onejump) is -0.1" in efficient.sentence
    details = dict(zip(sweep.grown, efficient.details, strict=True))
    assert all(detail.startswith(f"{arm} ") for arm, detail in details.items())
    assert "ppo is better than static_final:ppo (-0.4" in details["ppo"]
    assert "ties with static-2 (" in details["tamiyo"]
    assert "loses to static-2 (+0.1" in details["lag"]
    assert transfer.outcome == "cannot say"


@pytest.mark.parametrize("beaten_by", ["envelope", "schedule", "final size"])
def test_a_winner_has_to_win_against_all_three(beaten_by):
    sweep = SyntheticSweep(
        statics={1: 1.4, 2: 1.0 if beaten_by == "envelope" else 1.2, 3: 1.25, 4: 1.4},
        grown={"ppo": 1.1, "onejump": 1.1 if beaten_by == "schedule" else 1.3},
        final_size=1.0 if beaten_by == "final size" else 1.3,
    )
    verdict = judged(sweep)
    assert verdict.criteria[1].outcome == ("met" if beaten_by == "schedule" else "not met")  # by the schedule itself
    winner = "onejump ends lower than all" if beaten_by == "schedule" else "no grown arm ends lower than all"
    assert winner in verdict.criteria[1].sentence
    assert claim(verdict, "ppo", beaten_by).outcome in ("worse", "tie")


def test_a_control_that_beats_all_is_told_of_but_does_not_win():
    """Nor does it make the correction for the others any stricter."""
    alone = SyntheticSweep(grown={"tamiyo": 1.2, "onejump": 1.3})
    sweep = SyntheticSweep(grown=alone.grown | {"random:tamiyo": 1.0})
    verdict = judged(sweep)
    efficient = verdict.criteria[1]
    assert efficient.outcome == "not met"
    assert (
        "no grown arm ends lower than all of its opponents; the grown arm that ends lowest is tamiyo,"
        in efficient.sentence
    )
    assert efficient.details[-1].startswith("random:tamiyo (a control: it cannot win) is better than")
    assert {claim(verdict, "random:tamiyo", opponent).outcome for opponent in OPPONENTS} == {"better"}
    assert next(row for row in verdict.rows if row.label == "random:tamiyo").outcome == "better"
    for opponent in OPPONENTS:
        found = claim(verdict, "random:tamiyo", opponent)
        assert found.p_holm == found.p  # a family of one
    family = [claim(verdict, arm) for arm in alone.grown]
    assert [c.p_holm for c in family] == holm([c.p for c in family]).tolist()


@pytest.mark.parametrize("amount", [40, 40.0])
def test_a_budget_of_steps_is_one_of_tokens(amount):
    """Every arm takes as many tokens in a step; the words stay the user's."""
    sweep = SyntheticSweep(grown={"ppo": 1.0, "tamiyo": 1.2, "onejump": 1.3})
    sweep.cost = {label: {"tokens": 1e9} for label in sweep.truths()}
    point = sweep.point() | {"budget": {"axis": "steps", "amount": amount}, "spec": {"budget": {"interior": [9, 30]}}}
    verdict = judge(sweep.tables(noise(sweep) / 100), point, sweep=sweep.sweep())
    assert (verdict.axis, verdict.amount) == ("steps", 40)
    efficient = verdict.criteria[1]
    assert efficient.sentence.startswith("By the numbers alone, at 40 steps ppo ends lower than all of its opponents")
    assert efficient.withheld == ("The budget, 40 steps, is outside the preset's range, 9 to 30.",)
    assert claim(verdict, "tamiyo", axis="tokens").outcome == "tie"
    row = next(row for row in verdict.rows if row.label == "tamiyo")
    assert row.difference == claim(verdict, "tamiyo", axis="tokens").interval


def test_without_grown_arms_nothing_is_said_of_growing():
    sweep = SyntheticSweep(grown={})
    tables = sweep.tables()
    timeline = SyntheticSweep().timeline().iloc[:0]
    mechanics, efficient, _ = judged(sweep, Tables(tables.curves, tables.finals, timeline)).criteria
    assert mechanics.outcome == efficient.outcome == "cannot say"


def test_without_static_runs_there_is_no_envelope():
    sweep = SyntheticSweep()
    tables = sweep.tables()
    finals = tables.finals[tables.finals["arm"] != "static"]
    verdict = judge(
        Tables(tables.curves, finals, tables.timeline), sweep.point(None), sweep=sweep.sweep() | {"sizes": []}
    )
    assert verdict.size is None
    assert set(verdict.envelope.values()) == {()}
    assert {c.outcome for c in verdict.claims if c.opponent == "envelope"} == {"cannot say"}
    assert all(row.difference is None for row in verdict.rows)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "met"),
        ({"val_loss_after": 1.5009}, "met"),
        ({"val_loss_after": 1.4985}, "not met"),
        ({"val_loss_after": np.nan}, "not met"),
        ({"outcome": "rolled back"}, "not met"),
        ({"purpose": "rates", "val_loss_after": 9.0}, "met"),
        ({"grid": "another", "val_loss_after": 9.0}, "met"),
    ],
)
def test_mechanics_is_met_when_no_graft_did_harm(change, outcome):
    sweep = SyntheticSweep()
    tables = sweep.tables()
    timeline = tables.timeline.copy()
    timeline.loc[0, list(change)] = list(change.values())
    mechanics = judged(sweep, Tables(tables.curves, tables.finals, timeline)).criteria[0]
    assert mechanics.outcome == outcome
    here = len(timeline) - ("purpose" in change or "grid" in change)
    assert mechanics.sentence.startswith(f"{here} grafts on {here} runs")


@pytest.mark.parametrize(
    ("label", "grafts", "outcome"),
    [
        ("random:tamiyo", 2, "not met"),
        ("random:tamiyo", 0, "met"),
        ("static-1", 0, "met"),
    ],
)
def test_a_run_that_diverged_counts_against_growing_only_if_it_grew(label, grafts, outcome):
    sweep = SyntheticSweep(grown={"tamiyo": 1.2, "random:tamiyo": 1.3, "onejump": 1.3})
    mechanics = judged(sweep, edited(sweep.tables(), label, seed=2, diverged=True, grafts=grafts)).criteria[0]
    assert mechanics.outcome == outcome
    assert f"1 run(s) diverged ({label} on seed 2)" in mechanics.sentence
    assert ("without a graft" in mechanics.sentence) == (not grafts)


def test_a_graft_that_was_rolled_back_counts_whoever_chose_it():
    sweep = SyntheticSweep(grown={"tamiyo": 1.2, "random:tamiyo": 1.3})
    tables = sweep.tables()
    timeline = tables.timeline.copy()
    timeline.loc[(timeline["label"] == "random:tamiyo") & (timeline["seed"] == 2), "outcome"] = "rolled back"
    mechanics = judged(sweep, Tables(tables.curves, tables.finals, timeline)).criteria[0]
    assert mechanics.outcome == "not met"
    assert "1 of them was rolled back" in mechanics.sentence
