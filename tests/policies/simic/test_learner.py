"""Stock PPO over the dispatcher: it learns, repeats by its seed, survives a killed worker, and resumes."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import tree
from ray.rllib.algorithms.ppo import PPO
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from simic_toy import SPACE, ToyRun
from test_dispatcher import local

from esper.platform.errors import UserError
from esper.platform.spec import PPOSpec, RunSpec
from esper.policies.simic.fleet import LocalFleet, RayFleet
from esper.policies.simic.learner import (
    AHEAD,
    build_algorithm,
    current_policy,
    iteration_metrics,
    restore_algorithm,
    runner,
    save_algorithm,
)
from esper.policies.simic.policy import SimicPolicy
from esper.policies.simic.runner import SimicEnvRunner
from esper.workers.actor import GrowthWorker

SPEC = RunSpec(ppo=PPOSpec(decisions=128, minibatch=64, epochs=6, learning_rate=2e-3, hidden=64, entropy=0.01))


@pytest.fixture
def make(local_ray):
    """Make algorithms that are stopped at the end."""
    made = []

    def algorithm(build=build_algorithm, *args, n: int = 4, seed: int = 0, spec: RunSpec = SPEC) -> PPO:
        made.append(build(*args, spec, SPACE, lambda: LocalFleet(local(ToyRun), n), seed=seed))
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


def test_checkpoint_goes_on(make, tmp_path: Path):
    algorithm = make()
    train(algorithm, 2)
    save_algorithm(algorithm, tmp_path / "c", {"preset": "toy"})
    with pytest.raises(UserError, match="exists already"):
        save_algorithm(algorithm, tmp_path / "c")

    restored = make(restore_algorithm, tmp_path / "c")
    telemetry = ToyRun().reset(None, 1)
    assert current_policy(restored).act(telemetry) == SimicPolicy.load(tmp_path / "c").act(telemetry)
    assert restored.iteration == 2
    ours, theirs = (a.learner_group.get_state()["learner"] for a in (algorithm, restored))
    assert theirs["weights_seq_no"] == ours["weights_seq_no"] == 2
    moments = [tree.flatten(state["optimizer"]) for state in (ours, theirs)]
    assert len(moments[0]) > 3 * len(list(current_policy(algorithm).net.parameters()))  # step and two moments each
    for mine, other in zip(*moments, strict=True):
        np.testing.assert_array_equal(mine, other)

    number = algorithm.env_runner.get_state()["next_episode"]
    assert number > 0
    assert restored.env_runner.get_state()["next_episode"] == number
    result = restored.train()
    assert result["training_iteration"] == 3
    assert iteration_metrics(result)["lag_max"] == 0  # chosen by the restored weights
    assert restored.env_runner.get_state()["weights_seq_no"] == 3


def test_no_checkpoint_there(make, tmp_path: Path):
    with pytest.raises(UserError, match="holds no algorithm/ folder"):
        make(restore_algorithm, tmp_path)


def test_checkpoint_of_another_size(make, tmp_path: Path):
    save_algorithm(make(), tmp_path / "c")
    wider = SPEC.model_copy(update={"ppo": SPEC.ppo.model_copy(update={"hidden": 8})})
    with pytest.raises(UserError, match="cannot be restored"):
        make(restore_algorithm, tmp_path / "c", spec=wider)


def test_training_survives_a_killed_worker(local_ray):
    fleets: list[RayFleet] = []

    def make_fleet() -> RayFleet:
        fleets.append(RayFleet(lambda: GrowthWorker.options(num_cpus=0.1).remote(ToyRun), lambda: 2))
        return fleets[-1]

    algorithm = build_algorithm(SPEC, SPACE, make_fleet, seed=0)
    try:
        first = iteration_metrics(algorithm.train())
        local_ray.kill(fleets[0]._actors[1])
        later = [iteration_metrics(algorithm.train()) for _ in range(3)]
    finally:
        algorithm.stop()
    assert first["failures"] == 0
    assert later[-1]["failures"] == 1
    assert 0 < later[-1]["busy"] <= 1
    assert all(0 <= m["lag_mean"] <= m["lag_max"] <= 4 for m in later)
    assert torch.isfinite(torch.tensor([m["return_mean"] for m in later])).all()


def test_two_workers_at_one_to_eight_every_episode_is_learned_from_once(local_ray, monkeypatch):
    learned: list[int] = []
    sample = SimicEnvRunner.sample

    def noting(self, **kwargs):
        episodes = sample(self, **kwargs)
        learned.extend(int(episode.id_) for episode in episodes)
        return episodes

    monkeypatch.setattr(SimicEnvRunner, "sample", noting)
    seconds = iter((0.01, 0.08))
    make_worker = lambda: GrowthWorker.options(num_cpus=0.1).remote(partial(ToyRun, next(seconds)))  # noqa: E731
    algorithm = build_algorithm(SPEC, SPACE, lambda: RayFleet(make_worker, lambda: 2), seed=0)
    try:
        metrics = [iteration_metrics(algorithm.train()) for _ in range(4)]
        flying = runner(algorithm).dispatcher.in_flight()
    finally:
        algorithm.stop()
    assert len(learned) == len(set(learned)) == sum(each["episodes"] for each in metrics)
    assert sorted({*learned, *flying}) == list(range(len(learned) + len(flying)))  # none is missing
    # An iteration is at least 128 decisions, or 64 of the slow worker's: eight episodes of its own. So what it learns
    # from is no older than the queue is long (`AHEAD`), and one more.
    assert all(0 <= each["lag_mean"] <= each["lag_max"] <= AHEAD + 2 for each in metrics)
    assert max(each["lag_max"] for each in metrics) >= 1  # chosen before the update that came in between


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
    kept = batch[Columns.LOSS_MASK].numpy().astype(bool)  # the connector adds a row to each episode, and masks it
    advantages = batch[Postprocessing.ADVANTAGES].numpy()
    found, wanted = advantages[kept], np.array(expected)
    scale, shift = np.polyfit(wanted, found, 1)  # RLlib standardises, over its own rows too
    np.testing.assert_allclose(found, scale * wanted + shift, atol=1e-4)
    assert scale == pytest.approx(1 / np.std(wanted), rel=0.1)
