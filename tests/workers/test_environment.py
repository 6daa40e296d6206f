"""GrowthEnv keeps Gymnasium's, DACBench's and sb3-contrib's rules, and plays the same episodes as the run itself."""

import itertools
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.workers.environment import growth_env, growth_surrogate_env
from esper.workers.instances import instance_set
from esper.workers.laws.surrogate import SurrogateRun
from tests.workers.growing_run import plain

SURROGATE, TEXT = "Esper/GrowthSurrogate-v0", "Esper/Growth-v0"


def played(env, seed, choose, **reset):
    """(observation, reward, info) by (observation, reward, info), wall times left out."""
    observation, info = env.reset(seed=seed, **reset)
    steps, terminated = [(observation, 0.0, plain(info))], False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(choose(env))
        assert not truncated
        steps.append((observation, reward, plain(info)))
    return steps


def any_legal(seed):
    random = np.random.default_rng(seed)
    return lambda env: random.choice(np.flatnonzero(env.action_masks()))


def same(a, b):
    for (one, *rest), (other, *others) in zip(a, b, strict=True):
        assert rest == others
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("id", [SURROGATE, TEXT])
def test_gymnasiums_checker_finds_nothing(id, tiny_spec, shards):
    keywords = {"spec": tiny_spec, "data": shards} if id == TEXT else {}
    check_env(gym.make(id, **keywords).unwrapped)


def test_the_id_with_its_module_is_enough_in_a_process_that_never_imported_esper():
    code = f"""import gymnasium, sys; assert 'esper' not in sys.modules
env = gymnasium.make('esper.workers.environment:{SURROGATE}', spec='demo')
env.reset(seed=0); env.step(env.action_space.sample()); assert 'ray' not in sys.modules"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_an_episode_is_the_runs_own():
    spec = load_spec("tinystories-char")
    env, run = growth_surrogate_env(spec), SurrogateRun(spec)
    steps = played(env, 7, any_legal(2), options={"instance_id": 5})
    telemetry, random = run.reset(instance_set("train", spec)[5], 7), np.random.default_rng(2)
    for (observation, *_), (_, reward, info) in itertools.pairwise(steps):
        assert all(np.array_equal(observation[name], array) for name, array in telemetry.arrays().items())
        row = int(random.choice(np.flatnonzero(telemetry.mask)))
        assert info["action"] == str(telemetry.actions[row])
        transition = run.step(GraftAction(row, telemetry.sequence))
        assert transition.reward == reward
        telemetry = transition.telemetry
    assert run.ended
    assert (info["summary"], info["val_loss"]) == (plain(run.summary()), run.loss)


def test_an_illegal_row_is_taken_as_wait_and_flagged():
    env = growth_surrogate_env("demo")
    waits = played(env, 0, lambda env: 0)
    flagged = played(env, 0, lambda env: np.flatnonzero(~env.action_masks())[-1])
    for steps, expected in ((waits, False), (flagged, True)):
        assert {info.pop("illegal") for _, _, info in steps[1:]} == {expected}
    same(flagged, waits)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda env: env.step(int(env.action_space.n)), "is not in Discrete"),
        (lambda env: env.reset(options={"instance_id": 128}), "unknown instance_id 128: the set has 128"),
        (lambda env: growth_surrogate_env("demo", "trian"), r"unknown instance set 'trian'.*'train'"),
        (lambda env: growth_env("demo"), "data=FOLDER"),
    ],
)
def test_what_no_agent_may_ask_for_is_refused_in_a_sentence(ask, sentence):
    env = growth_surrogate_env("demo")
    env.reset(seed=0)
    with pytest.raises(UserError, match=sentence):
        ask(env)


def test_resets_go_round_the_set_in_order_from_where_seed_or_options_say():
    own = (2, 3, 5, 7)
    env = growth_surrogate_env("demo", {i: Instance(law=i, budget=i) for i in own})
    firsts = set()
    for seed in (*range(20), 0):
        order = [env.reset(seed=seed if k == 0 else None)[1]["instance_id"] for k in range(6)]
        start = own.index(order[0])
        assert order == [own[(start + k) % 4] for k in range(6)]
        firsts.add(order[0])
    assert firsts == set(own)
    assert env.reset(seed=0, options={"instance_id": 5})[1]["instance_id"] == 5
    assert env.run.clock.amount == 5 * env.run.spec.budget.amount
    assert [env.reset()[1]["instance_id"] for _ in range(2)] == [7, 2]


def test_sb3_contribs_maskable_ppo_trains_and_keeps_to_the_mask():
    from sb3_contrib import MaskablePPO

    flagged = []

    class Watch(gym.Wrapper):
        def step(self, action):
            *result, info = self.env.step(action)
            flagged.append(info["illegal"])
            return *result, info

    env = Watch(gym.make(SURROGATE, spec=load_spec("tinystories-char", ["budget.decisions=8"])))
    MaskablePPO("MultiInputPolicy", env, n_steps=128, batch_size=64, n_epochs=1, seed=0).learn(256)
    assert flagged == [False] * 256
