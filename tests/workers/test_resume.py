"""A run that is saved and restored goes on to the same numbers, to the bit, from any decision and within one.

Killed at random moments, too. Alone: `pytest tests/workers/test_resume.py`.
"""

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
from growing_run import choose, finish, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.platform.checkpoint import read
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.spec import DataSpec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData, prepare


class Stop(Exception):
    """Raised between two optimizer steps."""


@pytest.fixture
def spec(tiny_spec):
    """Every blueprint, dropout, seeds that are fused within the run, experts with their balance."""
    return tiny_spec.model_copy(
        update={
            "host": tiny_spec.host.model_copy(update={"dropout": 0.1}),
            "optimizer": tiny_spec.optimizer.model_copy(update={"betas": (0.9, 0.5)}),
            "budget": tiny_spec.budget.model_copy(update={"amount": 160}),
            "growth": tiny_spec.growth.model_copy(
                update={
                    "probation_steps": 12,
                    "blueprints": {"attention": {}, "ffn": {"width": 8}, "expert": {"width": 8}, "block": {}},
                }
            ),
        }
    )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(1, 158), seed=st.integers(0, 3))
def test_restored_anywhere_it_ends_the_same(spec, tokens, tmp_path_factory, stop, seed):
    undisturbed = GrowthRun(spec, tokens)
    undisturbed.reset(Instance(data=(0.1, 0.9)), seed=seed)
    expected = finish(undisturbed)

    def stopper(run):
        if run.ledger.steps == stop:
            raise Stop

    run = GrowthRun(spec, tokens, on_step=stopper)
    telemetry = run.reset(Instance(data=(0.1, 0.9)), seed=seed)
    try:
        while not run.ended:
            telemetry = run.step(choose(telemetry)).telemetry
    except Stop:
        pass
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    run.save(folder)
    restored = GrowthRun.restore(folder, tokens)
    assert restored.ledger.steps == run.ledger.steps
    assert finish(restored) == expected
    arrays = undisturbed.telemetry.arrays()
    assert all(np.array_equal(values, arrays[name]) for name, values in restored.telemetry.arrays().items())
    weights = undisturbed.trainer.host.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in restored.trainer.host.state_dict().items())


def test_saving_changes_nothing(spec, tokens, tmp_path):
    run = GrowthRun(spec, tokens)
    telemetry = run.reset(seed=0)
    while not run.ended:
        run.save(tmp_path / str(telemetry.sequence))
        telemetry = run.step(choose(telemetry)).telemetry
    undisturbed = GrowthRun(spec, tokens)
    undisturbed.reset(seed=0)
    assert outcome(run) == finish(undisturbed)
    last = max(int(path.name) for path in tmp_path.iterdir())
    _, tensors = read(tmp_path / str(last))
    assert {name.split("/")[0] for name in tensors} == {"now"}  # between decisions there is one snapshot, not two


def test_other_text_is_refused(spec, tokens, tmp_path):
    run = GrowthRun(spec, tokens)
    run.reset(seed=0)
    run.save(tmp_path / "checkpoint")
    (tmp_path / "other.txt").write_text("\n<|endoftext|>\n".join(f"{i} and another text {i}" * 9 for i in range(90)))
    prepare(DataSpec(source=str(tmp_path / "other.txt")), tmp_path / "other")
    with pytest.raises(UserError, match="other text or another tokenizer"):
        GrowthRun.restore(tmp_path / "checkpoint", TokenData.open(tmp_path / "other"))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_the_same(spec, shards, tmp_path, kills):
    """SIGKILL; each time the next process goes on from what lies on the disk."""
    spec = spec.model_copy(update={"budget": spec.budget.model_copy(update={"amount": 100 * kills, "decisions": 60})})
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    folder = tmp_path / "checkpoints"
    command = [sys.executable, growing_run.__file__, str(tmp_path / "spec.json"), str(shards), str(folder)]
    draws = random.Random(0)
    for _ in range(kills):
        saved = folder / "run.safetensors"
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
