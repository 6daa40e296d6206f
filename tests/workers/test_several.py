"""One run for several specs: that of its instance's task, with padded observations, also after a checkpoint."""

import numpy as np
import pytest

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.several import SeveralRuns, shared_space


@pytest.fixture
def specs(tiny_spec):
    return [tiny_spec, tiny_spec.overridden({"growth.max_layers": 6, "budget.amount": 50})]


def made(specs):
    return SeveralRuns([SurrogateRun(spec) for spec in specs], shared_space(specs))


@pytest.mark.parametrize("task", [0, 1])
def test_it_is_the_run_of_its_instances_task(specs, task):
    several, alone, space = made(specs), SurrogateRun(specs[task]), shared_space(specs)
    instance, seen = Instance(task=task), []
    seen.append((several.reset(instance, 3), alone.reset(instance, 3)))
    for index in (int(alone.telemetry.legal()[-1]), 0):
        mine, theirs = several.step(GraftAction(index, seen[-1][0].sequence)), None
        theirs = alone.step(GraftAction(index, seen[-1][1].sequence))
        assert mine.reward == theirs.reward
        seen.append((mine.telemetry, theirs.telemetry))
    for mine, theirs in seen:
        assert mine.problems(space) is None
        assert (mine.actions, mine.site_ids) == (theirs.actions, theirs.site_ids)
        for name, array in theirs.arrays().items():
            padded = mine.arrays()[name]
            np.testing.assert_array_equal(padded[: len(array)], array)
            assert not padded[len(array) :].any()
    again = made(specs)
    again.load(*several.state())
    np.testing.assert_array_equal(again.telemetry.candidates, several.telemetry.candidates)
    while not alone.ended:
        expected = alone.step(GraftAction(0, alone.telemetry.sequence))
        assert again.step(GraftAction(0, again.telemetry.sequence)).reward == expected.reward
    assert again.summary() == alone.summary()


def test_a_checkpoint_of_no_task_is_refused(specs):
    with pytest.raises(UserError, match="names no task"):
        made(specs).load({"instance": {"task": 2}}, {})
