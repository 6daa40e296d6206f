"""Losses at a cost, the envelope of static sizes and the best size, on laws that are known."""

import sys
from pathlib import Path

import numpy as np
import pytest

from esper.pipelines.reports.baselines import Trials, draw_envelope
from esper.pipelines.reports.runs import AXES

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_sweeps import BUDGET, SyntheticSweep

FORKS = (0.1, 0.25, 0.5)


def trials(sweep: SyntheticSweep) -> Trials:
    return Trials(sweep.runs(0), sweep.point())


def law(sweep: SyntheticSweep, size: int, axis: str, cost: np.ndarray) -> np.ndarray:
    share = cost / sweep.final_cost(f"static-{size}")[axis]
    return sweep.statics[size] + sweep.slope * (share**-sweep.power - 1)


@pytest.mark.parametrize("axis", AXES)
def test_a_loss_is_that_of_its_points_and_between_them_within_the_bound(axis):
    sweep = SyntheticSweep(forks=FORKS)
    run, last = trials(sweep).statics["static-2"][1], sweep.final_cost("static-2")[axis]
    costs = last * np.array([*FORKS, 1.0])
    np.testing.assert_allclose(run.loss_at(axis, costs), law(sweep, 2, axis, costs), rtol=1e-12)
    for low, high in ((0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        cost = last * np.geomspace(low * (1 + 1e-12), high * (1 - 1e-12), 101)
        error = run.loss_at(axis, cost) - law(sweep, 2, axis, cost)
        bound = sweep.slope * low**-sweep.power * (sweep.power * np.log(high / low)) ** 2 / 8
        assert error.min() > -1e-9
        assert bound / 3 < error.max() < bound
    assert np.isnan(run.loss_at(axis, last * np.array([0.09, 1.03]))).all()
    assert run.loss_at(axis, 1.01 * last) == run.loss  # within the tolerance


def test_the_envelope_is_the_lowest_mean_of_any_size_at_every_cost():
    """By their laws the small size is lower up to 0.7e12 FLOPs, the large one from there."""
    crossing = 1.2 + 0.3 * 0.7**-0.5 * (2**0.5 - 1)
    cost = {"static-1": {"flops": 1e12}, "static-2": {"flops": 2e12}}
    sweep = SyntheticSweep(statics={1: crossing, 2: 1.2}, cost=cost)
    statics = trials(sweep).statics
    costs, losses = draw_envelope(statics.values(), "flops")
    assert costs[0] == pytest.approx(0.25e12)
    assert costs[-1] == pytest.approx(2e12)
    assert (np.diff(costs) > 0).all()
    for size, mine in ((1, costs < 0.65e12), (2, costs > 0.85e12)):
        run = statics[f"static-{size}"][1]
        np.testing.assert_allclose(losses[mine], run.loss_at("flops", costs[mine]), rtol=1e-12)
    assert draw_envelope([], "flops")[0].size == 0


def test_the_envelope_never_rises():
    """A size that overshoots the budget ends last, and higher than another one has ended."""
    sweep = SyntheticSweep(statics={1: 1.2, 2: 1.4}, cost={"static-2": {"parameter_seconds": 1.1 * BUDGET}})
    costs, losses = draw_envelope(trials(sweep).statics.values(), "parameter_seconds")
    assert costs[-1] == pytest.approx(1.1 * BUDGET)
    assert losses[-1] == pytest.approx(1.2, abs=0.01)
    assert (np.diff(losses) <= 0).all()


def test_points_that_are_empty_or_cost_nothing_are_left_out():
    sweep = SyntheticSweep()
    [run] = [run for run in sweep.runs() if run.name == "static-2-1"]
    run.summary["annealed"][1]["val_loss"] = None
    run.summary["annealed"][2]["flops"] = 0.0
    run.summary["annealed"].reverse()
    np.testing.assert_allclose(run.points("parameter_seconds")[0], BUDGET * np.array([0.25, 0.75, 1.0]))
    assert len(run.points("flops")[0]) == 2
    assert (np.diff(run.points("parameter_seconds")[1]) < 0).all()
