"""A run's loss at a cost, and the envelope of static sizes, on laws that are known."""

import numpy as np
import pytest

from esper.pipelines.reports.paired_tests import Trials, draw_envelope
from esper.pipelines.reports.runs import AXES
from tests.pipelines.reports.synthetic_sweeps import BUDGET, SyntheticSweep

FORKS = (0.1, 0.25, 0.5)


def trials(sweep: SyntheticSweep) -> Trials:
    return Trials(sweep.runs(0), sweep.point(), list(sweep.truths()))


@pytest.mark.parametrize("axis", AXES)
def test_a_loss_is_that_of_its_points_and_between_them_within_the_bound(axis):
    sweep = SyntheticSweep(forks=FORKS)
    run, last = trials(sweep).statics["static-2"][1], sweep.final_cost("static-2")[axis]

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
    statics = trials(SyntheticSweep(statics={1: crossing, 2: 1.2}, cost=cost)).statics
    costs, losses = draw_envelope(statics.values(), "flops")
    np.testing.assert_allclose(costs[[0, -1]], [0.25e12, 2e12])
    assert (np.diff(costs) > 0).all()
    for size, mine in ((1, costs < 0.65e12), (2, costs > 0.85e12)):
        run = statics[f"static-{size}"][1]
        np.testing.assert_allclose(losses[mine], run.loss_at("flops", costs[mine]), rtol=1e-12)
    assert draw_envelope([], "flops")[0].size == 0
    # One that overshoots the budget ends higher than another has ended.
    sweep = SyntheticSweep(statics={1: 1.2, 2: 1.4}, cost={"static-2": {"parameter_seconds": 1.1 * BUDGET}})
    _, losses = draw_envelope(trials(sweep).statics.values(), "parameter_seconds")
    assert (np.diff(losses) <= 0).all()
