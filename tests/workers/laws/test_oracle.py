"""The oracle's bound is the best of all that can be done; the best fixed schedule is simulated as it plays."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.contracts import GraftAction, Instance
from esper.platform.spec import load_spec
from esper.policies.schedule import Entry, SchedulePolicy
from esper.workers.instances import instance_set
from esper.workers.laws.oracle import NONE, Simulator, best_fixed_schedule, bound
from esper.workers.laws.surrogate import SurrogateRun

AMOUNTS = {"parameter_seconds": 2e5, "seconds": 10, "flops": 1.5e11, "tokens": 1.5e6, "steps": 1501}


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


@settings(max_examples=10)
@given(
    axis=st.sampled_from(list(AMOUNTS)),
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
    assert bound(spec, instance) == pytest.approx(best_from(run), abs=1e-9)


def played(run: SurrogateRun, entries: list[tuple[float, str]], instance: Instance) -> float:
    policy = SchedulePolicy([Entry(at=at, blueprint=blueprint) for at, blueprint in entries])
    telemetry = run.reset(instance, seed=0)
    while not run.ended:
        telemetry = run.step(policy.act(telemetry)).telemetry
    return run.loss


@pytest.mark.parametrize(
    ("preset", "axis", "amount", "override"),
    [
        ("tinystories-char", "parameter_seconds", 3e6, "growth.min_optimizer_steps=600"),  # not legal in small budgets
        ("tinystories-char", "seconds", 60, "clock.graft_seconds=3.1"),  # decisions merge
        ("tinystories-char", "tokens", 7.5e6, "growth.max_layers=3"),  # entries wait for ever
        ("tinystories-char", "steps", 5000, "growth.blueprints.attention.limit=3"),
        ("digits", "parameter_seconds", 1e5, "growth.min_optimizer_steps=1"),  # at the deepest site
    ],
)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**30), density=st.floats(0.1, 1))
def test_simulated_is_played(preset, axis, amount, override, seed, density):
    budget = [f"budget.axis={axis}", f"budget.amount={amount}"]
    spec = load_spec(preset, [*budget, "growth.max_layers=4", override])
    random = np.random.default_rng(seed)
    instances = [instance_set("train", spec)[int(i)] for i in random.integers(0, 50, 4)]
    simulator = Simulator(spec, instances)
    grafts = random.random(simulator.decisions) < density
    schedule = np.where(grafts, random.integers(0, 3, simulator.decisions), NONE)
    entries = simulator.entries(schedule)
    run = SurrogateRun(spec)
    found = [played(run, entries, instance) for instance in instances]
    np.testing.assert_allclose(simulator.losses(schedule[None])[0], found, atol=1e-9)


def test_the_best_schedule_is_better_than_none_and_no_match_for_one_who_looks():
    spec = load_spec("tinystories-char")
    train, test = (list(instance_set(name, spec).values()) for name in ("train", "test"))
    entries = best_fixed_schedule(spec, train[:60])
    run = SurrogateRun(spec)
    assert np.mean([played(run, entries, i) - played(run, [], i) for i in train[:40]]) < -0.05
    gaps = [played(run, entries, instance) - bound(spec, instance) for instance in test[:30]]
    assert min(gaps) >= -1e-9
    assert np.mean(gaps) >= 0.05  # measured on all: 0.12
