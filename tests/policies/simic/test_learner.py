"""Stock PPO over the dispatcher: it learns, repeats by its seed, survives a killed worker, and resumes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPO
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from simic_toy import SPACE, ToyRun
from test_dispatcher import local

from esper.platform import checkpoint
from esper.platform.errors import UserError
from esper.platform.spec import PPOSpec, RunSpec
from esper.policies.simic.fleet import LocalFleet
from esper.policies.simic.learner import (
    STATE,
    build_algorithm,
    current_policy,
    iteration_metrics,
    runner,
    save_algorithm,
)
from esper.policies.simic.policy import SimicPolicy

SPEC = RunSpec(ppo=PPOSpec(decisions=128, minibatch=64, epochs=6, learning_rate=2e-3, hidden=64, entropy=0.01))


@pytest.fixture
def make(local_ray):
    """Make algorithms that are stopped at the end."""
    made = []

    def algorithm(n: int = 4, seed: int = 0, spec: RunSpec = SPEC, **options) -> PPO:
        made.append(build_algorithm(spec, SPACE, lambda: LocalFleet(local(ToyRun), n), seed=seed, **options))
        return made[-1]

    yield algorithm
    for each in made:
        each.stop()


def train(algorithm: PPO, iterations: int) -> list[dict[str, float]]:
    """Metrics of each iteration but what the clock says."""
    results = [iteration_metrics(algorithm.train()) for _ in range(iterations)]
    timed = ("seconds", "seconds_max", "waiting")
    return [{k: v for k, v in metrics.items() if not k.endswith(timed)} for metrics in results]


def test_learns_the_toy_task(make):
    curve = train(make(seed=2), 12)
    assert curve[0]["return_mean"] < 2
    assert curve[-1]["return_mean"] > 5  # waiting always gives 1.6, the best is 8
    assert curve[-1]["entropy"] < curve[0]["entropy"]
    first = curve[0]
    assert first["wait"] == pytest.approx(0.7, abs=0.1)
    assert first["wait"] + first["graft"] + first["prune"] == pytest.approx(1)
    assert first["heads"] + first["width"] == pytest.approx(first["graft"])
    assert first["lag_max"] == first["failures"] == first["refused"] == first["dropped"] == 0
    assert first["decisions"] == 128
    assert first["val_loss"] == 1.5
    assert all(np.isfinite(v) for metrics in curve for v in metrics.values())


def test_equal_seeds_give_equal_trainings(make):
    one, two, other = (train(make(seed=seed), 3) for seed in (5, 5, 6))
    assert one == two
    assert one != other


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_training_that_is_gone_on_with_is_the_same_to_the_bit(make, tmp_path: Path):
    """Weights, moments, KL coefficient, baseline, minibatches, episodes under way; and no pickle there is read."""
    straight = make(journal=tmp_path / "straight")
    whole = train(straight, 5)
    assert whole[-1]["kl_coefficient"] != 0.2  # it has adapted
    save_algorithm(straight, tmp_path / "whole")

    first = make(journal=tmp_path / "first")
    begun = train(first, 3)
    save_algorithm(first, tmp_path / "c", {"preset": "toy"})
    for name in ("algorithm_state.pkl", "class_and_ctor_args.pkl", "state.pkl", "policy.pkl"):
        (tmp_path / "c" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    resumed = make(journal=tmp_path / "first", start=tmp_path / "c")
    np.random.seed(99)
    torch.manual_seed(99)
    later = train(resumed, 2)
    for name in ("redone", "learned_share"):
        for metrics in (*whole, *later):
            metrics.pop(name)
    assert later == whole[3:]
    assert begun[-1]["return_mean"] == whole[2]["return_mean"]
    save_algorithm(resumed, tmp_path / "end")
    (state, tensors), (other, others) = (checkpoint.read(tmp_path / each / STATE) for each in ("whole", "end"))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert {**state, "progress": None} == {**other, "progress": None}
    assert state["progress"]["learned"] == other["progress"]["learned"]
    one, two = (SimicPolicy.load(tmp_path / each).net.state_dict() for each in ("whole", "end"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "exploded").exists()


def test_a_resumed_training_takes_a_new_rate(make, tmp_path: Path):
    algorithm = make()
    train(algorithm, 1)
    save_algorithm(algorithm, tmp_path / "c")
    with pytest.raises(UserError, match="exists already"):
        save_algorithm(algorithm, tmp_path / "c")
    still = SPEC.model_copy(update={"ppo": SPEC.ppo.model_copy(update={"learning_rate": 1e-12})})
    restored = make(start=tmp_path / "c", spec=still)
    train(restored, 1)
    telemetry = ToyRun().reset(None, 1)
    assert current_policy(restored).act(telemetry).reason == SimicPolicy.load(tmp_path / "c").act(telemetry).reason


def test_what_is_no_checkpoint_of_this_training_is_refused(make, tmp_path: Path):
    with pytest.raises(UserError, match="is not there"):
        make(start=tmp_path)
    save_algorithm(make(), tmp_path / "c")
    wider = SPEC.model_copy(update={"ppo": SPEC.ppo.model_copy(update={"hidden": 8})})
    with pytest.raises(UserError, match=r"does not fit ppo\.hidden 8"):
        make(start=tmp_path / "c", spec=wider)
    state, tensors = checkpoint.read(tmp_path / "c" / STATE)
    for odd_state, odd_tensors in (
        ({**state, "baseline": {}}, tensors),
        ({**state, "progress": {**state["progress"], "learned": -1}}, tensors),
        (state, {**tensors, "baseline.gram": torch.zeros(2)}),
        (state, {**tensors, "optimizer.0": torch.zeros(2)}),
        (state, {name: tensor for name, tensor in tensors.items() if not name.startswith("module.")}),
    ):
        checkpoint.write(tmp_path / "c" / STATE, odd_state, odd_tensors)
        with pytest.raises(UserError):
            make(start=tmp_path / "c")
    (tmp_path / "c" / STATE).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match="is damaged"):
        make(start=tmp_path / "c")
    assert not (tmp_path / "exploded").exists()


def test_a_learner_in_a_process_of_its_own_learns_the_same_task(local_ray):
    spec = SPEC.model_copy(update={"ppo": SPEC.ppo.model_copy(update={"learners": 1})})
    algorithm = build_algorithm(spec, SPACE, lambda: LocalFleet(local(ToyRun), 4), seed=2)
    try:
        curve = train(algorithm, 6)
        policy = current_policy(algorithm)
    finally:
        algorithm.stop()
    assert curve[-1]["return_mean"] > curve[0]["return_mean"] + 1
    assert curve[-1]["lag_max"] == 0
    assert all(torch.isfinite(value).all() for value in policy.net.state_dict().values())


def test_advantages_by_hand(make):
    """What the learner is given, against arithmetic: GAE (Schulman et al. 2015, 1506.02438, eq. 16) with γ = 1."""
    algorithm = make(n=2)
    episodes = runner(algorithm).sample()
    learner = algorithm.learner_group._learner
    expected = []
    for episode in episodes:
        rewards, observations = episode.get_rewards(), episode.get_observations()
        assert len(rewards) == 8
        with torch.no_grad():
            inputs = {name: torch.from_numpy(array) for name, array in observations.items()}
            values = learner.module[DEFAULT_MODULE_ID].compute_values({Columns.OBS: inputs}).numpy().astype(np.float64)
        values[-1] = 0.0  # terminated
        for k in range(8):
            deltas = [rewards[j] + values[j + 1] - values[j] for j in range(k, 8)]
            expected.append(sum(SPEC.ppo.gae_lambda**j * delta for j, delta in enumerate(deltas)))
    batch = learner._learner_connector(
        rl_module=learner.module, batch={}, episodes=episodes, shared_data={}, metrics=learner.metrics
    )[DEFAULT_MODULE_ID]
    assert Columns.LOSS_MASK not in batch  # the rows that RLlib adds are gone, and count nowhere
    assert {len(batch[column]) for column in batch if column != Columns.OBS} == {len(expected)}
    wanted = np.array(expected)
    found = batch[Postprocessing.ADVANTAGES].numpy()
    np.testing.assert_allclose(found, (wanted - wanted.mean()) / wanted.std(), atol=1e-5)
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std() == pytest.approx(1, abs=1e-6)
