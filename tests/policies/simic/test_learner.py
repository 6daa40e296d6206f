"""Stock PPO over the dispatcher: it learns, repeats by its seed, survives a killed worker, and resumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import tree
from ray.rllib.algorithms.ppo import PPO
from simic_toy import SPACE, ToyRun
from test_dispatcher import local

from esper.platform.errors import UserError
from esper.platform.spec import PPOSpec, RunSpec
from esper.policies.simic.fleet import LocalFleet, RayFleet
from esper.policies.simic.learner import (
    build_algorithm,
    current_policy,
    iteration_metrics,
    restore_algorithm,
    save_algorithm,
)
from esper.policies.simic.policy import SimicPolicy
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
