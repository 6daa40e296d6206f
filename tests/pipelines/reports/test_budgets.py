"""Losses at a cost, envelopes, regrets and the part of the budget saved, on sweeps whose truth is known."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from esper.pipelines.reports.budgets import OverBudgets, Regret, over_budgets
from esper.pipelines.reports.figures import draw_budgets
from esper.pipelines.reports.page import budget_tables, short
from esper.pipelines.reports.paired_tests import Trials, draw_envelope
from esper.pipelines.reports.runs import AXES
from esper.pipelines.reports.verdict import Verdict, judge
from tests.pipelines.reports.synthetic_sweeps import BUDGET, FAILED, SyntheticSweep

BUDGETS = (0.5e6, 1e6, 2e6, 4e6, 8e6)
SEEDS = (1, 2, 3, 4, 5, 6)


def law(budget: float) -> float:
    """The envelope's loss: what the better of two sizes reaches."""
    return 1.1 + 0.3 * (budget / 1e6) ** -0.6


def swept(
    grown: Callable[[float], dict[str, float]], budgets: Sequence[float] = BUDGETS, noise: float = 1e-9, **changes
) -> list[Verdict]:
    """A sweep over budgets: size 1 is the best up to a million, size 2 from there on."""
    verdicts = []
    for budget in budgets:
        grid, best = json.dumps({"budget.amount": budget}), 1 if budget <= 1e6 else 2
        statics = {size: law(budget) + 0.05 * (size != best) for size in (1, 2)}
        truth = SyntheticSweep(statics=statics, grown=grown(budget), seeds=SEEDS, grid=grid, **changes)
        own = truth.point(size=str(best), budget={"axis": "parameter_seconds", "amount": budget})
        verdicts.append(judge(truth.runs(noise), own, truth.sweep()))
    return verdicts


def only(verdicts: Sequence[Verdict]) -> OverBudgets:
    [found] = over_budgets(verdicts)
    return found


def at(over: OverBudgets, arm: str) -> dict[float | None, Regret]:
    """By budget; None for the mean."""
    return {row.budget: row for row in over.rows if row.arm == arm}


def test_regret_is_to_the_size_chosen_at_each_budget_and_its_mean_is_taken_seed_by_seed():
    shift = dict(zip(BUDGETS, (0.03, -0.02, -0.01, 0.0, 0.02), strict=True))
    verdicts = swept(lambda budget: {"onejump": law(budget) + shift[budget]}, noise=0.01)
    over = only(verdicts[::-1])  # in whatever order
    assert over.budgets.tolist() == list(BUDGETS)
    by_seed = []
    for verdict, best in zip(verdicts, ("static-1", "static-1", "static-2", "static-2", "static-2"), strict=True):
        test = verdict.trials.test
        by_seed.append([test["onejump"][seed].loss - test[best][seed].loss for seed in SEEDS])
    rows, means = at(over, "onejump"), np.mean(by_seed, axis=0)
    for budget, values in zip(BUDGETS, by_seed, strict=True):
        assert rows[budget].values.tolist() == values
    assert rows[None].values == pytest.approx(means)
    interval, half = rows[None].interval, 2.5706 * means.std(ddof=1) / np.sqrt(6)  # t quantile of 5 degrees of freedom
    assert interval is not None
    assert (interval.mean, interval.half) == (pytest.approx(means.mean()), pytest.approx(half, rel=1e-4))
    assert rows[None].as_dict()["detectable"] == pytest.approx(half / 2.5706 * 3.5, rel=0.05)  # 2.57 + 0.92, about
    assert at(over, "static-2")[4e6].values.tolist() == [0.0] * 6
    assert at(over, "static-1")[4e6].values.mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25, 1.6])
def test_an_arm_that_ends_where_the_envelope_ends_with_another_budget_saves_that(factor):
    """In between the budgets to 2 points; beyond them a saving is told too small, and a waste too large."""
    over = only(swept(lambda budget: {"onejump": law(factor * budget)}))
    saved = {budget: row.saved[0] for budget, row in at(over, "onejump").items() if row.saved}
    assert len(saved) == len(BUDGETS) + 1
    for budget in BUDGETS[1:-1]:
        assert saved[budget] == pytest.approx(1 - 1 / factor, abs=0.02)
    end = BUDGETS[-1] if factor > 1 else BUDGETS[0]
    assert saved[end] <= 1 - 1 / factor + 1e-6
    assert saved[end] == pytest.approx(1 - 1 / factor, abs=0.1)


def test_the_interval_of_what_is_saved_covers_the_truth_as_often_as_it_says():
    covered, exact = [], only(swept(lambda budget: {"onejump": law(1.25 * budget)}))
    for sweep in range(150):
        noise, over = np.random.default_rng(sweep).normal(0, 0.004, (2, len(BUDGETS), len(SEEDS))), replace(exact)
        over.regrets["onejump"] = over.regrets["onejump"] + (noise[0] - noise[1]).T
        for budget in BUDGETS[1:-1]:
            saved = at(over, "onejump")[budget].saved
            covered.append(saved[1] <= 0.2 <= saved[2])
    assert 0.91 <= np.mean(covered) <= 0.98


def test_a_budget_at_which_the_envelope_is_no_lower_is_no_part_of_its_curve():
    """And without two points that fall there is no curve."""
    bump = swept(lambda budget: {"onejump": law(budget)})
    for run in [run for runs in bump[2].trials.test.values() for run in runs.values()]:
        run.summary["val_loss"] += 0.5
    row = at(only(bump), "onejump")[2e6]
    assert row.saved == pytest.approx([0, 0, 0], abs=1e-6)
    from_second = swept(lambda budget: {"onejump": law(1.25 * budget)})
    for run in from_second[0].trials.test["static-1"].values():
        run.summary["diverged"] = True
    assert at(only(from_second), "onejump")[1e6].saved == pytest.approx([0.2] * 3, abs=0.02)
    flat = swept(lambda budget: {"onejump": 1.0}, budgets=(1e6, 2e6))
    for verdict in flat:
        for run in (*verdict.trials.test["static-1"].values(), *verdict.trials.test["static-2"].values()):
            run.summary["val_loss"] = 1.2
    rows = at(only(flat), "onejump")
    assert [row.saved for row in rows.values()] == [[]] * 3
    assert rows[None].values == pytest.approx([-0.2] * 6)


def test_a_seed_that_lacks_a_loss_is_left_out_there_and_of_the_mean():
    verdicts = swept(lambda budget: {"onejump": law(budget)}, edits={("onejump", 3): FAILED})
    rows = at(only([*verdicts[:2], *swept(lambda budget: {"onejump": law(budget)})[2:]]), "onejump")
    assert [len(rows[budget].values) for budget in (*BUDGETS, None)] == [5, 5, 6, 6, 6, 5]


def test_the_one_schedule_for_all_budgets_is_chosen_on_tuning_seeds():
    """Gradual is better at most budgets, onejump in the mean."""
    over = only(swept(lambda budget: {"onejump": law(budget), "gradual": law(budget) - 0.01 + 0.1 * (budget < 1e6)}))
    assert over.best_schedule == "onejump"
    minus = over.minus_schedule("gradual")
    assert minus is not None
    assert minus.mean == pytest.approx(0.01)
    assert over.minus_schedule("onejump") is None
    untuned = only(swept(lambda budget: {"onejump": 1.0, "gradual": 1.0}, tuning_seeds=()))
    assert untuned.best_schedule is None


def test_what_is_told_and_drawn():
    over = only(swept(lambda budget: {"onejump": law(1.25 * budget)}))
    table, saved = budget_tables(over)
    assert table.columns.tolist()[:7] == ["arm", "500k", "1M", "2M", "4M", "8M", "mean"]
    assert saved.set_index("arm").loc["onejump", "2M"] == "+20% (+20% to +20%)"
    assert [short(amount) for amount in (24, 1.5e6, 3e15)] == ["24", "1.5M", "3P"]
    for what, ends in (("regret", [law(1.25 * budget) - law(budget) for budget in BUDGETS]), ("saved", [0.2] * 5)):
        draw_budgets(axes := plt.figure().subplots(), over, what)
        names, drawn = axes.get_legend_handles_labels()[1], [bars[0].get_ydata() for bars in axes.containers]
        assert [name.split(": ")[0] for name in names] == ["best static at each budget", *over.regrets]
        np.testing.assert_allclose(drawn[list(over.regrets).index("onejump")][1:-1], ends[1:-1], atol=0.02)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["500k", "1M", "2M", "4M", "8M"]
    assert over_budgets(swept(lambda budget: {"onejump": 1.0}, budgets=(1e6,))) == []


FORKS = (0.1, 0.25, 0.5)


def of_point(sweep: SyntheticSweep) -> Trials:
    return Trials(sweep.runs(0), sweep.point(), list(sweep.truths()))


@pytest.mark.parametrize("axis", AXES)
def test_a_loss_is_that_of_its_points_and_between_them_within_the_bound(axis):
    sweep = SyntheticSweep(forks=FORKS)
    run, last = of_point(sweep).statics["static-2"][1], sweep.final_cost("static-2")[axis]

    def error(share: np.ndarray) -> np.ndarray:
        return run.loss_at(axis, last * share) - (1.2 + sweep.slope * (share**-sweep.power - 1))

    np.testing.assert_allclose(error(np.array([*FORKS, 1.0])), 0, atol=1e-12)
    for low, high in ((0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        between = error(np.geomspace(low * (1 + 1e-12), high * (1 - 1e-12), 101))
        bound = sweep.slope * low**-sweep.power * (sweep.power * np.log(high / low)) ** 2 / 8
        assert between.min() > -1e-9
        assert bound / 3 < between.max() < bound
    assert np.isnan(run.loss_at(axis, last * np.array([0.09, 1.03]))).all()
    assert run.loss_at(axis, 1.01 * last) == run.loss  # within the tolerance


def test_the_envelope_is_the_lowest_mean_of_any_size_at_every_cost_and_never_rises():
    """By their laws the small size is lower up to 0.7e12 FLOPs, the large one from there."""
    crossing = 1.2 + 0.3 * 0.7**-0.5 * (2**0.5 - 1)
    cost = {"static-1": {"flops": 1e12}, "static-2": {"flops": 2e12}}
    statics = of_point(SyntheticSweep(statics={1: crossing, 2: 1.2}, cost=cost)).statics
    costs, losses = draw_envelope(statics.values(), "flops")
    np.testing.assert_allclose(costs[[0, -1]], [0.25e12, 2e12])
    assert (np.diff(costs) > 0).all()
    for size, mine in ((1, costs < 0.65e12), (2, costs > 0.85e12)):
        run = statics[f"static-{size}"][1]
        np.testing.assert_allclose(losses[mine], run.loss_at("flops", costs[mine]), rtol=1e-12)
    assert draw_envelope([], "flops")[0].size == 0
    # One that overshoots the budget ends higher than another has ended.
    sweep = SyntheticSweep(statics={1: 1.2, 2: 1.4}, cost={"static-2": {"parameter_seconds": 1.1 * BUDGET}})
    _, losses = draw_envelope(of_point(sweep).statics.values(), "parameter_seconds")
    assert (np.diff(losses) <= 0).all()
