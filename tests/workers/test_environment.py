"""GrowthEnv keeps Gymnasium's, DACBench's and sb3-contrib's rules, and plays the same episodes as the run itself.

On loss laws and on a tiny GPT; trains a MaskablePPO for some seconds.
Alone: `pytest tests/workers/test_environment.py`.
"""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.workers.environment import GrowthEnv, growth_env, growth_surrogate_env
from esper.workers.instances import instance_set
from esper.workers.laws.surrogate import SurrogateRun

SURROGATE, TEXT = "Esper/GrowthSurrogate-v0", "Esper/Growth-v0"
CLOCKS = ("wall_seconds", "validation_seconds")


def make(id, **keywords) -> GrowthEnv:
    env = gym.make(id, **keywords).unwrapped
    assert isinstance(env, GrowthEnv)
    return env


def played(env, seed, choose, **reset):
    """Observations, rewards and infos of an episode, wall times left out."""
    observation, info = env.reset(seed=seed, **reset)
    observations, rewards, infos = [observation], [], [info]
    while True:
        observation, reward, terminated, truncated, info = env.step(choose(env))
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
        assert not truncated
        if terminated:
            return observations, rewards, [without_clocks(info) for info in infos]


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def any_legal(seed):
    random = np.random.default_rng(seed)
    return lambda env: random.choice(np.flatnonzero(env.action_masks()))


def same(a, b):
    assert a[1:] == b[1:]
    for x, y in zip(a[0], b[0], strict=True):
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[name], y[name]) for name in x)


# -- Gymnasium ------------------------------------------------------------------------------------------------------


def test_gymnasiums_checker_finds_nothing():
    check_env(make(SURROGATE))


def test_gymnasiums_checker_finds_nothing_on_text(tiny_spec, shards):
    check_env(make(TEXT, spec=tiny_spec, data=shards))


def test_the_id_with_its_module_is_enough_in_a_process_that_never_imported_esper():
    code = (
        "import gymnasium, sys; assert 'esper' not in sys.modules\n"
        f"env = gymnasium.make('esper.workers.environment:{SURROGATE}', spec='demo')\n"
        "env.reset(seed=0); env.step(env.action_space.sample()); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_copies_run_side_by_side():
    envs = gym.make_vec(SURROGATE, num_envs=3, spec="demo")
    envs.reset(seed=0)
    for _ in range(30):
        _, rewards, terminated, _, infos = envs.step(np.zeros(3, np.int64))
        assert rewards.shape == (3,)
        if terminated.all():
            assert infos["summary"]["val_loss"].shape == (3,)
            break
    else:
        pytest.fail("no episode ended")
    envs.close()


def test_equal_seeds_give_equal_numbers_to_the_bit(tiny_spec, shards):
    for env, again in (
        (growth_surrogate_env("demo"), growth_surrogate_env("demo")),
        (growth_env(tiny_spec, shards), growth_env(tiny_spec, shards)),
    ):
        first = played(env, 3, any_legal(0))
        same(first, played(again, 3, any_legal(0)))
        played(env, 4, any_legal(1))
        same(first, played(env, 3, any_legal(0)))  # whatever came before


# -- The episode ----------------------------------------------------------------------------------------------------


def test_an_episode_is_the_runs_own():
    spec = load_spec("tinystories-char")
    env, run = growth_surrogate_env(spec), SurrogateRun(spec)
    observations, rewards, infos = played(env, 7, any_legal(2), options={"instance_id": 5})
    telemetry, random = run.reset(instance_set("train", spec)[5], 7), np.random.default_rng(2)
    for k, reward in enumerate(rewards):
        assert all(np.array_equal(observations[k][name], array) for name, array in telemetry.arrays().items())
        row = int(random.choice(np.flatnonzero(telemetry.mask)))
        assert infos[k + 1]["action"] == str(telemetry.actions[row])
        transition = run.step(GraftAction(row, telemetry.sequence))
        assert transition.reward == reward
        telemetry = transition.telemetry
    assert run.ended
    assert infos[-1]["summary"] == without_clocks(run.summary())
    assert infos[-1]["val_loss"] == run.loss


def test_an_illegal_row_is_taken_as_wait_and_flagged():
    env = growth_surrogate_env("demo")
    plain = played(env, 0, lambda env: 0)

    def illegal(env):
        return np.flatnonzero(~env.action_masks())[-1]

    flagged = played(env, 0, illegal)
    assert [info.pop("illegal") for info in flagged[2][1:]] == [True] * len(flagged[1])
    assert [info.pop("illegal") for info in plain[2][1:]] == [False] * len(plain[1])
    same(flagged, plain)


def test_what_no_agent_may_ask_for_is_refused_in_a_sentence(tmp_path):
    env = growth_surrogate_env("demo")
    env.reset(seed=0)
    with pytest.raises(UserError, match="is not in Discrete"):
        env.step(int(env.action_space.n))
    with pytest.raises(UserError, match="unknown instance_id 128: the set has 128, from 0 to 127"):
        env.reset(options={"instance_id": 128})
    with pytest.raises(UserError, match=r"unknown instance set 'trian'.*'train'"):
        growth_surrogate_env("demo", "trian")
    with pytest.raises(UserError, match="set is empty"):
        growth_surrogate_env("demo", {})
    with pytest.raises(UserError, match="data=FOLDER"):
        growth_env("demo")
    with pytest.raises(UserError, match="nowhere"):
        growth_env("demo", tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown preset"):
        growth_surrogate_env("tinystory")


# -- Instances ------------------------------------------------------------------------------------------------------


def test_resets_go_round_the_set_in_order_from_where_the_seed_says():
    env = growth_surrogate_env("demo", {i: Instance(law=i) for i in (2, 3, 5, 7)})

    def ids(seed):
        return [env.reset(seed=seed if k == 0 else None)[1]["instance_id"] for k in range(6)]

    rounds = {seed: ids(seed) for seed in range(20)}
    assert rounds[0] == ids(0)
    for order in rounds.values():
        start = (2, 3, 5, 7).index(order[0])
        assert order == [(2, 3, 5, 7)[(start + k) % 4] for k in range(6)]
    assert {order[0] for order in rounds.values()} == {2, 3, 5, 7}


def test_options_name_an_instance_and_the_round_goes_on_after_it():
    env = growth_surrogate_env("demo", {0: Instance(budget=0.5), 1: Instance(budget=2.0), 2: Instance(law=1)})
    assert env.reset(seed=0, options={"instance_id": 1})[1]["instance_id"] == 1
    assert env.run.clock.amount == 2 * env.run.spec.budget.amount
    assert [env.reset()[1]["instance_id"] for _ in range(2)] == [2, 0]


# -- Another library's agent ----------------------------------------------------------------------------------------


def test_sb3_contribs_maskable_ppo_learns_and_keeps_to_the_mask():
    """128 episodes: the mean return rises by more than 0.1 nats, and no row that is not legal is ever taken."""
    from sb3_contrib import MaskablePPO

    torch.set_num_threads(1)
    spec = load_spec("tinystories-char", ["budget.decisions=8"])
    instances = {i: Instance(law=i, budget=4.0) for i in range(4)}
    env = gym.make(SURROGATE, spec=spec, instances=instances)
    flagged = []

    class Watch(gym.Wrapper):
        def step(self, action):
            *result, info = self.env.step(action)
            flagged.append(info["illegal"])
            return *result, info

    env = Watch(env)
    model = MaskablePPO(
        "MultiInputPolicy", env, n_steps=256, batch_size=128, n_epochs=4, learning_rate=2e-3, gamma=1.0, seed=0
    )

    def mean_return():
        torch.manual_seed(0)
        returns = []
        for k in range(12):
            observation, _ = env.reset(seed=k, options={"instance_id": k % 4})
            returns.append(0.0)
            terminated = False
            while not terminated:
                action, _ = model.predict(observation, action_masks=env.get_wrapper_attr("action_masks")())
                observation, reward, terminated, _, _ = env.step(action)
                returns[-1] += float(reward)
        return np.mean(returns)

    before = mean_return()
    model.learn(1024)
    assert mean_return() > before + 0.1
    assert len(flagged) == 1024 + 2 * 12 * 8
    assert not any(flagged)
