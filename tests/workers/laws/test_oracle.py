"""The oracle's bound equals enumeration of everything that can be done, and nothing played beats it."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.contracts import GraftAction, Instance
from esper.platform.spec import load_spec
from esper.workers.laws.oracle import bound
from esper.workers.laws.surrogate import SurrogateRun

AMOUNTS = {"parameter_seconds": 2e5, "seconds": 10, "flops": 1.5e11, "tokens": 1.5e6, "steps": 1501}
AXES = st.sampled_from(list(AMOUNTS))
ROUNDING = 1e-9  # nats


def fork(run: SurrogateRun) -> SurrogateRun:
    """An independent copy, quicker than `state` and `load`."""
    twin = copy.copy(run)
    twin.ledger, twin.clock = copy.copy(run.ledger), copy.copy(run.clock)
    for name in ("curve", "grafts", "prunes", "grafted"):
        setattr(twin, name, copy.copy(getattr(run, name)))
    return twin


def best_from(run: SurrogateRun) -> float:
    """By trying every legal action at every decision, prunes and sites included."""
    if run.ended:
        return run.loss
    found = []
    for row in run.telemetry.legal():
        branch = fork(run)
        branch.step(GraftAction(int(row), run.telemetry.sequence))
        found.append(best_from(branch))
    return min(found)


@settings(max_examples=10, deadline=None)
@given(
    axis=AXES,
    law=st.integers(0, 2**30),
    n_layer=st.integers(1, 2),
    budget=st.floats(0.3, 6),
    extra=st.sampled_from(
        [
            "clock.graft_seconds=0.001",
            "clock.graft_seconds=1",  # a third of a slice of the seconds
            "clock.graft_seconds=4",  # more than one: decisions merge
            "growth.blueprints.attention.limit=3",
            "growth.min_optimizer_steps=250",
            "growth.max_parameters=22000",
        ]
    ),
)
def test_it_equals_the_best_of_everything_that_can_be_done(axis, law, n_layer, budget, extra):
    budgeted = [f"budget.axis={axis}", f"budget.amount={AMOUNTS[axis]}", "budget.decisions=3"]
    spec = load_spec("tinystories-char", [*budgeted, "growth.max_layers=2", "growth.min_optimizer_steps=1", extra])
    instance, run = Instance(budget=budget, n_layer=n_layer, law=law), SurrogateRun(spec)
    run.reset(instance)
    assert bound(spec, instance) == pytest.approx(best_from(run), abs=ROUNDING)


@settings(max_examples=10, deadline=None)
@given(AXES, st.integers(0, 2**30), st.floats(0.25, 4), st.integers(1, 3), st.floats(0, 1))
def test_nothing_played_beats_it(axis, seed, budget, n_layer, eagerness):
    spec = load_spec("tinystories-char", [f"budget.axis={axis}", f"budget.amount={AMOUNTS[axis] * 5}"])
    instance, random = Instance(budget=budget, n_layer=n_layer), np.random.default_rng(seed)
    run = SurrogateRun(spec)
    telemetry = run.reset(instance, seed)
    while not run.ended:
        row = int(random.choice(telemetry.legal())) if random.random() < eagerness else 0
        telemetry = run.step(GraftAction(row, telemetry.sequence)).telemetry
    assert run.loss >= bound(spec, instance, seed) - ROUNDING
