"""A run that is stopped, saved and restored goes on to the same numbers, to the bit; odd states are refused."""

import random
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.platform.checkpoint import pack, unpack
from esper.platform.contracts import Instance
from esper.platform.data_spec import DataSpec
from esper.platform.errors import UserError
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData, prepare
from tests.workers.growing_run import act, begun, changed, choose, finish, odd, outcome, same_telemetry, same_weights

INSTANCE = Instance(data=(0.1, 0.9))


class Stop(Exception):
    pass


def stop(run=None):
    raise Stop


@pytest.fixture
def spec(domain, small_spec):
    """Every blueprint, dropout or BatchNorm, seeds that settle within the run, gates with their balance, a cooldown."""
    return changed(
        small_spec,
        host={"dropout": 0.1} if domain == "text" else {},
        optimizer={"betas": (0.9, 0.5)},
        budget={"amount": 96, "cooldowns": (0.5,)},
        growth={"probation_steps": 12},
    )


@pytest.fixture
def undisturbed(spec, data, monkeypatch):
    """A run that has ended, and how often it could have been stopped."""
    monkeypatch.setattr("esper.workers.run.CONTRIBUTION_SHARE", 0.5)  # of slices so short, enough to measure some
    calls = []
    run = begun(spec, data, seed=1, instance=INSTANCE)
    run.on_step = calls.append
    finish(run)
    assert run.annealed
    assert run.contributed
    return run, len(calls)


@settings(
    max_examples=settings.default.max_examples // 2,  # each is a run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(part=st.floats(0, 1))
def test_stopped_and_restored_anywhere_it_ends_the_same(undisturbed, spec, data, part):
    """Between two steps, within an evaluation, a measurement of contributions or a cooldown."""
    expected, calls = undisturbed
    stops = iter([False] * int(part * (calls - 2)) + [True])
    run = begun(spec, data, seed=1, instance=INSTANCE)
    run.on_step = lambda run: stop() if next(stops) else None
    with pytest.raises(Stop):
        finish(run)
    restored = GrowthRun(spec, data)
    restored.load(*unpack(pack(*run.state()), "saved"))
    assert restored.ledger.steps == run.ledger.steps
    assert finish(restored) == outcome(expected)
    assert same_telemetry(restored.telemetry, expected.telemetry)
    assert same_weights(restored, expected.trainer.host.state_dict())


def test_other_text_and_another_spec_are_refused(tiny_spec, tokens, tmp_path):
    spec = tiny_spec
    state = begun(spec, tokens).state()
    with pytest.raises(UserError, match="another spec"):
        GrowthRun(changed(spec, budget={"amount": 97}), tokens).load(*state)
    more = GrowthRun(changed(spec, ppo={"iterations": 97}, fleet={"workers": 3}), tokens)
    more.load(*state)  # a training's own settings decide no numbers of its runs
    assert more.state()[0]["spec"]["ppo"]["iterations"] == 97
    (tmp_path / "other.txt").write_text("\n<|endoftext|>\n".join(f"{i} and another text {i}" * 9 for i in range(90)))
    prepare(DataSpec(source=str(tmp_path / "other.txt")), tmp_path / "other")
    with pytest.raises(UserError, match="other data, or text by another tokenizer"):
        GrowthRun(spec, TokenData.open(tmp_path / "other")).load(*state)


@pytest.fixture
def stopped(spec, data, grafts):
    """A run within a slice, with a fused seed, young ones of every kind, and a prune behind it."""
    plan = grafts["width"], grafts["layer"], grafts["gated"], grafts["other"]
    run = begun(changed(spec, budget={"cooldowns": ()}), data, *plan)
    act(run, grafts["gated"], None, "prune")

    run.on_step = stop
    with pytest.raises(Stop):
        act(run, grafts["width"])
    return run


def odd_tensors(tensors, chance):
    """The tensors with one missing, of another shape, of other numbers, or under another name."""
    rest, name = tensors.copy(), chance.choice(sorted(tensors))
    tensor = rest.pop(name)
    return rest | chance.choice([{}, {name: torch.zeros(3)}, {name: tensor * torch.nan}, {name + "x": tensor}])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_an_odd_state_is_a_run_that_goes_on_or_a_sentence(stopped, data, seed):
    chance, (values, tensors) = random.Random(seed), stopped.state()
    run, of_values = GrowthRun(stopped.spec, data), chance.random() < 0.8
    try:
        run.load(odd(values, chance), tensors) if of_values else run.load(values, odd_tensors(tensors, chance))
    except UserError:
        return
    left = iter(range(300))  # a budget of 10¹² is a budget too
    run.on_step = lambda _: None if next(left, None) is not None else stop()
    with suppress(Stop):
        if run.unfinished:
            run.finish()
        while not run.ended and run.sequence < 8:
            run.step(choose(run.telemetry))
