"""Compiled steps: they agree with eager ones, and a run by them is as reproducible, to the bit.

A step's package is built once a session and shape, 25 s each.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from esper.platform.checkpoint import pack, unpack
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.storage import write_bytes
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.run import GrowthRun
from esper.workers.tolaria import compiled
from esper.workers.tolaria.trainer import Trainer
from tests.workers.growing_run import act, begun, changed, outcome, same_weights, weights


@pytest.fixture(scope="session")
def steps(tmp_path_factory):
    """The cache of packages of this session, which xdist's processes share."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "packages"


@pytest.fixture(autouse=True)
def cache(steps, monkeypatch):
    monkeypatch.setenv("ESPER_CACHE", str(steps))
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # the processor's flags are believed: 6 s less a build
    yield
    compiled.end_builds()  # of what no test waits for


@pytest.fixture
def spec(tiny_spec):
    """Seeds that settle after 10 steps, two slices."""
    parts = {"optimizer": {"betas": (0.9, 0.2)}, "growth": {"probation_steps": 6}, "trainer": {"compile": "on"}}
    return changed(tiny_spec, **parts)


def trainers(spec, tokens):
    return (Trainer(spec, tokens, make_blueprints(spec.growth.blueprints), 0, Instance()) for _ in range(2))


def built(trainer):
    package = trainer.package()
    while package.building():
        compiled._builds[package.path].wait()
    assert package.there, package.failure.read_text()
    return package


def test_both_paths_agree(spec, tokens):
    eager, fast = trainers(spec, tokens)
    for step in range(20):
        if step == 1:
            fast.bind(built(fast))
        eager.step(3e-3)
        fast.step(3e-3)
    assert fast.bound
    assert torch.allclose(torch.tensor(eager.measured()), torch.tensor(fast.measured()), rtol=0, atol=1e-5)
    assert fast.site_norms().keys() == eager.site_norms().keys()
    for site, norms in fast.site_norms().items():
        assert norms == pytest.approx(eager.site_norms()[site], rel=1e-2)
    (one, tensors), (other, others) = eager.state(), fast.state()
    assert one == other
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, others[name], atol=1e-4), name


def paths(run, *blueprints):
    told = []
    for blueprint in blueprints:
        act(run, *blueprint if isinstance(blueprint, tuple) else (blueprint,))
        told.append((run.path, run.trainer.bound))
    return told


EAGER, BUILDING, COMPILED = ("eager", False), ("building", False), ("compiled", True)


def test_a_run_goes_over_after_a_slice_without_young_seeds(spec, tokens):
    run = begun(changed(spec, budget={"amount": 80, "decisions": 16}), tokens)
    assert paths(run, None, None, "ffn") == [BUILDING, COMPILED, EAGER]
    assert paths(run, *[None] * 2) == [EAGER, BUILDING]
    assert paths(run, ("ffn", None, "prune"), None) == [BUILDING, COMPILED]
    assert run.trainer.steps == 35
    for step in run.trainer.optimizer.state.values():
        assert step["step"] == 35


@pytest.mark.slow  # it builds another shape
def test_both_paths_agree_on_a_grown_host(spec, tokens):
    spec = changed(spec, budget={"amount": 80, "decisions": 16})
    run, eager = (begun(changed(spec, trainer={"compile": how}), tokens, "ffn", "attention") for how in ("on", "off"))
    assert paths(run, *[None] * 6)[-2:] == [COMPILED] * 2
    paths(eager, *[None] * 6)
    assert run.loss == pytest.approx(eager.loss, abs=1e-4)


PLAY = """
import sys
from pathlib import Path
from esper.platform.contracts import GraftAction
from esper.platform.spec import RunSpec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData
run = GrowthRun(RunSpec.model_validate_json(sys.argv[1]), TokenData.open(Path(sys.argv[2])))
run.reset(seed=1)
while not run.ended:
    run.step(GraftAction(0, run.sequence))
assert run.path == "compiled"
print(run.loss.hex())
"""


def test_the_numbers_are_those_of_another_process_and_of_a_run_that_was_stopped(spec, tokens, shards):
    """Stopped in slices of either path, and within a cooldown."""
    built(next(trainers(spec, tokens)))  # a run that waits has more moments to be stopped at
    spec = changed(spec, budget={"cooldowns": (0.5,)})
    whole = begun(spec, tokens, seed=1)
    calls = []
    whole.on_step = calls.append
    assert paths(whole, *[None] * 8)[-1] == COMPILED
    played = [sys.executable, "-c", PLAY, spec.model_dump_json(), str(shards)]
    assert subprocess.run(played, capture_output=True, text=True, check=True).stdout.strip() == whole.loss.hex()
    for at in (3, 7, 12, 30, len(calls) - 2):
        stops = iter([False] * at + [True])
        run = begun(spec, tokens, seed=1)

        def stop(_, stops=stops):
            if next(stops):
                raise InterruptedError

        run.on_step = stop
        with pytest.raises(InterruptedError):
            paths(run, *[None] * 8)
        restored = GrowthRun(spec, tokens)
        restored.load(*unpack(pack(*run.state()), "saved"))
        if restored.unfinished:
            restored.finish()
        while not restored.ended:
            act(restored)
        assert outcome(restored) == outcome(whole), at
        assert same_weights(restored, weights(whole)), at


def test_a_copy_is_bound_anew_and_leaves_its_run_alone(spec, tokens):
    run = begun(spec, tokens, None, None)
    before = weights(run)
    fork = run.fork()
    assert run.trainer.bound
    assert not fork.trainer.bound
    act(fork)
    assert fork.trainer.bound
    assert same_weights(run, before)
    act(run)
    assert same_weights(run, weights(fork))


def test_a_failed_build_or_a_package_that_does_not_load_leaves_runs_eager(spec, tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path))
    loaded = begun(changed(spec, optimizer={"eps": 1e-7}), tokens)
    write_bytes(loaded.trainer.package().path, b"PK")
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    for run in (loaded, begun(changed(spec, data={"batch_size": 5}), tokens)):
        assert paths(run, *[None] * 3) == [BUILDING, EAGER, EAGER]
        assert "could not be built" in capsys.readouterr().err
    assert "Error" in run.trainer.package().failure.read_text()


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"host.dropout": 0.1}, "'on', but dropout cannot be compiled"),
        ({"dtype": "bfloat16"}, "'on', but bfloat16 on a CPU cannot be compiled"),
        ({"CXX": "no-such-compiler"}, "there is no C\\+\\+ compiler 'no-such-compiler' here"),
    ],
)
def test_what_cannot_be_compiled_is_refused_where_it_is_asked_for(spec, tokens, monkeypatch, parts, what):
    if "CXX" in parts:
        monkeypatch.setenv("CXX", parts.pop("CXX"))
    spec = spec.overridden(parts)
    with pytest.raises(UserError, match=what):
        begun(spec, tokens)
    for how in ("auto", "off"):
        begun(changed(spec, trainer={"compile": how}), tokens, None)


def test_auto_compiles_only_what_pays(spec, tokens):
    """Whatever is in the cache: a build that costs more than is saved does not, nor a step that is all arithmetic."""
    saved = spec.clock.base_seconds + spec.clock.layer_seconds
    worth, slow = int(compiled.BUILD_SECONDS / saved), spec.clock.flops_per_second / 1e5
    for steps, rate, path in ((worth // 2, 5e10, "eager"), (worth * 2, 5e10, "building"), (worth * 2, slow, "eager")):
        parts = {"budget": {"amount": steps, "decisions": 1000}, "clock": {"flops_per_second": rate}}
        assert begun(changed(spec, trainer={"compile": "auto"}, **parts), tokens, None).path == path


def test_the_wall_clock_does_not_wait(spec, tokens, tmp_path, monkeypatch):
    here = built(next(trainers(spec, tokens)))
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path))
    run = begun(changed(spec, clock={"kind": "wall"}), tokens, None, None)
    assert (run.path, run.trainer.bound) == ("compiled", False)
    run.trainer.package().path.parent.mkdir()
    shutil.copy(here.path, run.trainer.package().path)
    assert paths(run, None) == [COMPILED]
