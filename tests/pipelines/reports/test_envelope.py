"""The static envelope and the losses that it interpolates, on laws that are known.

Alone: `pytest tests/pipelines/reports/test_envelope.py`.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esper.pipelines.reports.envelope import best_size, draw_envelope, read_runs
from esper.pipelines.reports.opponents import Bench
from esper.pipelines.reports.tables import AXES, Tables

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_sweeps import BUDGET, SyntheticSweep

FORKS = (0.1, 0.25, 0.5)


def bench(**changes) -> Bench:
    sweep = SyntheticSweep(forks=FORKS, **changes)
    return Bench(read_runs(sweep.tables(), "{}"), sweep.point())


def law(sweep: SyntheticSweep, size: int, axis: str, cost: np.ndarray) -> np.ndarray:
    share = cost / sweep.final_cost(f"static-{size}")[axis]
    return sweep.statics[size] + sweep.slope * (share**-sweep.power - 1)


@pytest.mark.parametrize("axis", AXES)
def test_at_an_annealed_point_the_loss_is_the_points(axis):
    sweep = SyntheticSweep(forks=FORKS)
    for size, runs in bench().statics.items():
        costs = sweep.final_cost(f"static-{size}")[axis] * np.array([*FORKS, 1.0])
        for run in runs.values():
            np.testing.assert_allclose(run.loss_at(axis, costs), law(sweep, size, axis, costs), rtol=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_between_points_a_power_law_is_met_within_the_bound_and_never_from_below(axis):
    sweep = SyntheticSweep(forks=FORKS)
    run = bench().statics[2][1]
    last = sweep.final_cost("static-2")[axis]
    for low, high in ((0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        cost = last * np.geomspace(low * (1 + 1e-12), high * (1 - 1e-12), 101)
        error = run.loss_at(axis, cost) - law(sweep, 2, axis, cost)
        bound = sweep.slope * low**-sweep.power * (sweep.power * np.log(high / low)) ** 2 / 8
        assert error.min() > -1e-9
        assert bound / 3 < error.max() < bound


def test_a_law_in_log_cost_is_met_everywhere():
    run = read_runs(SyntheticSweep(slope=1e9, power=1e-9, forks=FORKS).tables(), "{}")[0]  # → 1 − log(share)
    share = np.geomspace(0.101, 0.999, 57)
    np.testing.assert_allclose(run.loss_at("flops", 1e12 * share), run.loss - np.log(share), atol=1e-6)


def test_outside_a_runs_points_there_is_no_loss():
    run = bench().statics[2][1]
    assert np.isnan(run.loss_at("parameter_seconds", BUDGET * np.array([0.09, 1.01]))).all()
    assert run.loss_by("parameter_seconds", 2 * BUDGET) == run.loss
    assert np.isnan(run.loss_by("parameter_seconds", 0.09 * BUDGET))


def test_the_envelope_is_the_lowest_size_at_every_cost():
    """By their laws the small size is lower up to 0.7e12 FLOPs, the large one from there."""
    crossing = 1.2 + 0.3 * 0.7**-0.5 * (2**0.5 - 1)
    sweep = SyntheticSweep(
        statics={1: crossing, 2: 1.2}, cost={"static-1": {"flops": 1e12}, "static-2": {"flops": 2e12}}
    )
    points = draw_envelope(Bench(read_runs(sweep.tables(), "{}"), sweep.point()).statics, "flops")
    costs, losses = [np.array([getattr(p, name) for p in points]) for name in ("cost", "loss")]
    assert costs[0] == pytest.approx(0.25e12)
    assert costs[-1] == pytest.approx(2e12)
    assert (np.diff(costs) > 0).all()
    assert {p.size for p in points if p.cost < 0.65e12} == {1}
    assert {p.size for p in points if p.cost > 0.85e12} == {2}
    assert {p.untrained for p in points if p.cost > 1.03e12} == {(1,)}
    assert {p.untrained for p in points if p.cost < 0.97e12} == {()}
    assert {p.unmeasured for p in points if p.cost < 0.48e12} == {(2,)}
    assert {p.unmeasured for p in points if p.cost > 0.52e12} == {()}
    assert {p.complete for p in points if 0.52e12 < p.cost < 0.97e12} == {True}
    assert not any(p.complete for p in points if not 0.48e12 < p.cost < 1.03e12)
    knots = np.array([0.25, 0.5, 0.75, 1.0])
    for size, last in ((1, 1e12), (2, 2e12)):
        mine = np.array([p.size == size for p in points])
        expected = np.interp(np.log(costs[mine]), np.log(last * knots), law(sweep, size, "flops", last * knots))
        np.testing.assert_allclose(losses[mine], expected, rtol=1e-12)


def test_the_envelope_never_rises():
    """A size that overshoots the budget ends last, and higher than another one has ended."""
    sweep = SyntheticSweep(statics={1: 1.2, 2: 1.4}, cost={"static-2": {"parameter_seconds": 1.1 * BUDGET}})
    points = draw_envelope(Bench(read_runs(sweep.tables(), "{}"), sweep.point()).statics, "parameter_seconds")
    assert points[-1].cost == pytest.approx(1.1 * BUDGET)
    assert points[-1].size == 1
    assert points[-1].untrained == (1,)
    assert points[-1].loss == pytest.approx(1.2, abs=0.01)
    assert (np.diff([p.loss for p in points]) <= 0).all()


def test_the_envelope_is_the_lowest_mean_not_the_mean_of_the_lowest():
    sweep = SyntheticSweep(statics={1: 1.30, 2: 1.20, 3: 1.21})
    frame = sweep.tables()
    noise = {("static-2", 1): -0.1, ("static-2", 2): 0.13, ("static-3", 1): 0.2, ("static-3", 2): -0.15}
    for (label, seed), shift in noise.items():
        frame.curves.loc[(frame.curves["label"] == label) & (frame.curves["seed"] == seed), "val_loss"] += shift
    last = draw_envelope(Bench(read_runs(frame, "{}"), sweep.point()).statics, "parameter_seconds")[-1]
    assert last.loss == pytest.approx(1.2 + 0.03 / 5)
    assert last.size == 2


def test_runs_without_forks_give_the_envelope_where_they_end():
    sweep = SyntheticSweep(forks=())
    statics = Bench(read_runs(sweep.tables(), "{}"), sweep.point()).statics
    assert [(p.cost, p.size) for p in draw_envelope(statics, "parameter_seconds")] == [(BUDGET, 2)]
    assert draw_envelope({}, "flops") == ()


def test_the_best_size_at_a_cost_says_when_a_better_one_may_be_missing():
    statics = bench().statics
    assert best_size(statics, "parameter_seconds", 0.6 * BUDGET) == (2, "")
    size, doubt = best_size(statics, "seconds", 0.9 * BUDGET)  # sizes 2, 3 and 4 end at less
    assert size == 1
    assert "outermost" in doubt
    assert best_size(statics, "seconds", 2 * BUDGET) == (2, "")  # beyond all: the lowest last loss
    assert best_size(statics, "seconds", 1.0) == (None, "")


def test_points_that_are_empty_or_cost_nothing_are_left_out():
    tables = SyntheticSweep().tables()
    curves = tables.curves.copy()
    forked = curves["budget_fraction"] == 0.5
    curves.loc[forked, "val_loss"] = np.nan
    curves["flops"] = 0.0
    tables = Tables(curves.sample(frac=1, random_state=0), tables.finals, tables.timeline)
    for run in read_runs(tables, "{}"):
        costs, losses = run.points["parameter_seconds"]
        np.testing.assert_allclose(costs, BUDGET * np.array([0.25, 0.75, 1.0]))
        assert (np.diff(losses) < 0).all()
        assert not len(run.points["flops"][0])


def test_what_mlflow_leaves_empty_is_read():
    """A failed run has no numbers, and a column may then be of any type."""
    tables = SyntheticSweep().tables()
    finals = tables.finals.astype({"val_loss": object, "diverged": object})
    finals.loc[0, ["status", "val_loss", "diverged", "tokens"]] = ["FAILED", None, None, None]
    finals.loc[1, ["status", "val_loss"]] = ["RUNNING", pd.NA]
    runs = read_runs(Tables(tables.curves, finals, tables.timeline), "{}")
    assert [run.sound for run in runs[:3]] == [False, False, True]
    assert not runs[0].diverged
