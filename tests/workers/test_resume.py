"""A run that is stopped, saved and restored goes on to the same numbers, to the bit; odd states are refused.

Killed at random moments, too. Alone: `pytest tests/workers/test_resume.py`.
"""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time

import growing_run
import numpy as np
import pytest
import torch
from growing_run import act, changed, choose, finish, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.platform.checkpoint import read
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.spec import DataSpec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData, prepare

INSTANCE = Instance(data=(0.1, 0.9))


class Stop(Exception):
    """Raised where a run may be stopped."""


@pytest.fixture
def spec(tiny_spec):
    """Every blueprint, dropout, seeds that are fused within the run, experts with their balance, a cooldown."""
    blueprints = {"attention": {}, "ffn": {"width": 8}, "expert": {"width": 8}, "block": {}}
    return changed(
        tiny_spec,
        host={"dropout": 0.1},
        optimizer={"betas": (0.9, 0.5)},
        budget={"amount": 96, "cooldowns": (0.5,)},
        growth={"probation_steps": 12, "blueprints": blueprints},
    )


@pytest.fixture
def undisturbed(spec, tokens, monkeypatch):
    """A run that has ended, and how often it could have been stopped."""
    monkeypatch.setattr("esper.workers.run.CONTRIBUTION_SHARE", 0.5)  # of slices so short, enough to measure some
    calls = []
    run = GrowthRun(spec, tokens, on_step=calls.append)
    run.reset(INSTANCE, seed=1)
    finish(run)
    assert run.annealed
    assert run._contributed
    return run, len(calls)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1))
def test_stopped_and_restored_anywhere_it_ends_the_same(undisturbed, spec, tokens, tmp_path_factory, part):
    """Between two steps, within an evaluation, a measurement of contributions or a cooldown."""
    expected, calls = undisturbed
    left = 1 + int(part * (calls - 2))

    def stopper(run):
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop

    run = GrowthRun(spec, tokens)
    run.reset(INSTANCE, seed=1)
    run.on_step = stopper
    with contextlib.suppress(Stop):
        while not run.ended:
            run.step(choose(run.telemetry))
    path = tmp_path_factory.mktemp("saved") / "run.safetensors"
    run.save(path)
    restored = GrowthRun.restore(path, tokens)
    assert restored.ledger.steps == run.ledger.steps
    assert finish(restored) == outcome(expected)
    arrays = expected.telemetry.arrays()
    assert all(np.array_equal(values, arrays[name]) for name, values in restored.telemetry.arrays().items())
    weights = expected.trainer.host.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in restored.trainer.host.state_dict().items())


def test_saving_changes_nothing(spec, tokens, tmp_path):
    run, other = GrowthRun(spec, tokens), GrowthRun(spec, tokens)
    run.reset(seed=0)
    other.reset(seed=0)
    while not run.ended:
        run.save(tmp_path / "run.safetensors")
        run.step(choose(run.telemetry))
    assert outcome(run) == finish(other)
    _, tensors = read(tmp_path / "run.safetensors")
    assert {name.split("/")[0] for name in tensors} == {"now"}  # between decisions there is one snapshot, not two


def test_other_text_and_another_spec_are_refused(spec, tokens, tmp_path):
    run = GrowthRun(spec, tokens)
    run.reset(seed=0)
    run.save(tmp_path / "run")
    with pytest.raises(UserError, match="another spec"):
        GrowthRun(changed(spec, budget={"amount": 97}), tokens).load(*run.state())
    (tmp_path / "other.txt").write_text("\n<|endoftext|>\n".join(f"{i} and another text {i}" * 9 for i in range(90)))
    prepare(DataSpec(source=str(tmp_path / "other.txt")), tmp_path / "other")
    with pytest.raises(UserError, match="other text or another tokenizer"):
        GrowthRun.restore(tmp_path / "run", TokenData.open(tmp_path / "other"))


@pytest.fixture
def stopped(spec, tokens):
    """The state of a run within a slice, with a fused seed, young ones of every kind, and a prune behind it."""
    run = GrowthRun(changed(spec, budget={"cooldowns": ()}), tokens)
    run.reset(seed=0)
    for blueprint in ("ffn", "block", "expert", "attention"):
        act(run, blueprint)
    act(run, "expert", operation="prune")

    def stop(run):
        raise Stop

    run.on_step = stop
    with pytest.raises(Stop):
        act(run, "ffn")
    return run


def odd(value, chance):
    """A copy of a JSON value in which one leaf or branch is something else."""
    if isinstance(value, dict | list) and value and chance.random() < 0.95:
        copy = value.copy()
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if chance.random() < 0.1:
            del copy[key]
        else:
            copy[key] = odd(value[key], chance)
        return copy
    numbers = [value - 1, value + 1, value * 2] if isinstance(value, int) else []
    return chance.choice([None, -1, 0, 10**12, 0.5, "x", "h0.ffn", [], {}, True, [[]], {"a": 1}, *numbers])


def odd_tensors(tensors, chance):
    """The tensors with one missing, of another shape, of other numbers, or under another name."""
    name = chance.choice(sorted(tensors))
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    added = [{}, {name: torch.zeros(3)}, {name: tensors[name] * 0}, {name + "x": tensors[name]}]
    return rest | chance.choice(added)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_an_odd_state_is_a_run_that_goes_on_or_a_sentence(stopped, tokens, seed):
    chance, (values, tensors) = random.Random(seed), stopped.state()
    run = GrowthRun(stopped.spec, tokens)
    try:
        if chance.random() < 0.8:
            run.load(odd(values, chance), tensors)
        else:
            run.load(values, odd_tensors(tensors, chance))
    except UserError:
        return
    if run.unfinished:
        run.finish()
    while not run.ended and run.sequence < 8:
        run.step(choose(run.telemetry))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_the_same(spec, shards, tmp_path, kills):
    """SIGKILL; each time the next process goes on from what lies on the disk."""
    spec = changed(spec, budget={"amount": 100 * kills, "decisions": 60})
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    folder = tmp_path / "checkpoints"
    command = [sys.executable, growing_run.__file__, str(tmp_path / "spec.json"), str(shards), str(folder)]
    saved, draws = folder / "run.safetensors", random.Random(0)
    for _ in range(kills):
        before = saved.stat().st_ino if saved.exists() else None
        process = subprocess.Popen(command)
        while (saved.stat().st_ino if saved.exists() else None) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    undisturbed = GrowthRun(spec, TokenData.open(shards))
    undisturbed.reset(seed=5)
    assert json.loads((tmp_path / "outcome.json").read_text()) == finish(undisturbed)
