"""PPO over the dispatcher: it learns, and goes on from its own checkpoints only."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from simic_toy import ToyRun

from esper.platform import checkpoint
from esper.platform.errors import UserError
from esper.policies.simic import ppo
from esper.policies.simic.health import Health
from esper.policies.simic.learner import ANCHOR
from esper.policies.simic.metrics import decided_on
from esper.policies.simic.net import ILLEGAL
from esper.policies.simic.policy import SimicPolicy
from esper.policies.simic.ppo import STATE


def test_learns_the_toy_task(make):
    training = make(seed=2)
    curve = [training.iterate() for _ in range(12)]
    first = curve[0]
    assert first["return_mean"] < 2
    assert curve[-1]["return_mean"] > 5  # waiting always gives 1.6, the best is 8
    assert curve[-1]["entropy"] < first["entropy"]
    health = Health(len(curve))
    assert not [warning for metrics in curve for warning in health.look(metrics)]
    assert first["wait"] == pytest.approx(0.7, abs=0.1)
    assert first["wait"] + first["graft"] + first["prune"] == pytest.approx(1)
    assert first["heads"] + first["width"] == pytest.approx(first["graft"])
    assert first["lag_max"] == first["failures"] == first["refused"] == first["dropped"] == 0
    assert (first["decisions"], first["val_loss"]) == (128, 1.5)
    assert all(np.isfinite(value) for metrics in curve for value in metrics.values())


def test_a_learner_in_a_process_of_its_own_learns_the_same_task(make, local_ray):
    training = make(seed=2, learners=1)
    curve = [training.iterate() for _ in range(6)]
    assert curve[-1]["return_mean"] > curve[0]["return_mean"] + 1
    assert curve[-1]["lag_max"] == 0
    assert all(torch.isfinite(value).all() for value in training.policy().net.state_dict().values())


def test_a_resumed_training_takes_a_new_rate(make, tmp_path: Path):
    training = make()
    training.iterate()
    training.save(tmp_path / "c")
    with pytest.raises(UserError, match="exists already"):
        training.save(tmp_path / "c")
    resumed = make(start=tmp_path / "c", learning_rate=1e-12)
    resumed.iterate()
    telemetry = ToyRun().reset(None, 1)
    assert resumed.policy().act(telemetry).reason == SimicPolicy.load(tmp_path / "c").act(telemetry).reason


def test_what_is_no_checkpoint_of_this_training_is_refused(make, local_ray, tmp_path: Path):
    make().save(tmp_path / "c")
    with pytest.raises(UserError, match=r"does not fit ppo\.hidden 8"):
        make(start=tmp_path / "c", hidden=8)
    state, tensors = checkpoint.read(tmp_path / "c" / STATE)
    for odd_state, odd_tensors in (
        ({**state, "baseline": {}}, tensors),
        ({**state, "progress": {**state["progress"], "learned": -1}}, tensors),
        (state, {**tensors, "baseline.gram": torch.zeros(2)}),
        (state, {**tensors, "optimizer.0": torch.zeros(2)}),
    ):
        checkpoint.write(tmp_path / "c" / STATE, odd_state, odd_tensors)
        with pytest.raises(UserError) as refused:  # the error's frames keep alive what was not shut down
            make(start=tmp_path / "c", learners=int("optimizer.0" in odd_tensors))
    end = time.monotonic() + 10
    there = local_ray.cluster_resources()["CPU"]
    while (free := local_ray.available_resources()["CPU"]) < there and time.monotonic() < end:
        time.sleep(0.1)
    assert free == there, refused  # no learner is left behind, which would keep its CPU


def test_advantages_by_hand(make, monkeypatch):
    """What the learner is given, against arithmetic: GAE (Schulman et al. 2015, 1506.02438, eq. 16) with γ = 1."""
    training = make()
    episodes = training.dispatcher.collect(128)
    rewards = training.baseline.shaped(episodes, training.baseline.potentials(episodes))
    given, seen, shaped = list(map(ppo._shaped, episodes, rewards)), [], ppo._shaped
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "_shaped", lambda *each: seen.append(each[1]) or shaped(*each))
        make().iterate()  # the same training: it shapes before it refits
    np.testing.assert_array_equal(seen, rewards)
    learner = training._learners._learner
    expected = []
    for episode in given:
        rewards, observations = episode.get_rewards(), episode.get_observations()
        with torch.no_grad():
            inputs = {name: torch.from_numpy(array) for name, array in observations.items()}
            values = learner.module[DEFAULT_MODULE_ID].compute_values({Columns.OBS: inputs}).numpy().astype(np.float64)
        values[-1] = 0.0  # terminated
        deltas = rewards + values[1:] - values[:-1]
        powers = 0.95 ** np.arange(8)  # λ of PPOSpec
        expected += [powers[: 8 - k] @ deltas[k:] for k in range(8)]
    batch = learner._learner_connector(
        rl_module=learner.module, batch={}, episodes=given, shared_data={}, metrics=learner.metrics
    )[DEFAULT_MODULE_ID]
    assert Columns.LOSS_MASK not in batch  # the rows that RLlib adds are gone, and count nowhere
    assert {len(batch[column]) for column in batch if column != Columns.OBS} == {len(expected)}
    wanted = (np.array(expected) - np.mean(expected)) / np.std(expected)
    np.testing.assert_allclose(batch[Postprocessing.ADVANTAGES].numpy(), wanted, atol=1e-5)


def test_the_anchors_term_by_hand(make):
    """0.5 · KL(p ‖ q), p = (0.7, 0.2, 0.1), q = (0.5, 0.25, 0.25); rows that are not legal add nothing."""
    training = make(anchor=0.5)
    training.anchor = training.policy().net
    episodes = training.dispatcher.collect(128)
    potentials = training.baseline.potentials(episodes)
    anchors = [training.anchor.logits(decided_on([each])).detach().numpy() for each in episodes]
    given = list(map(ppo._shaped, episodes, training.baseline.shaped(episodes, potentials), anchors))
    learner = training._learners._learner
    batch = learner._learner_connector(
        rl_module=learner.module, batch={}, episodes=given, shared_data={}, metrics=learner.metrics
    )[DEFAULT_MODULE_ID]
    np.testing.assert_array_equal(batch[ANCHOR].numpy(), np.concatenate(anchors))
    odd = [ILLEGAL, ILLEGAL]
    p, q = (torch.tensor([*np.log(each), *odd]).float() for each in ([0.7, 0.2, 0.1], [0.5, 0.25, 0.25]))
    outputs = {Columns.ACTION_DIST_INPUTS: p.expand(len(batch[ANCHOR]), -1)}
    how = {"module_id": DEFAULT_MODULE_ID, "config": learner.config, "fwd_out": outputs}
    loss = lambda rows: learner.compute_loss_for_module(batch=rows, **how).item()  # noqa: E731
    without = {name: column for name, column in batch.items() if name != ANCHOR}
    term = loss(batch | {ANCHOR: q.expand(len(batch[ANCHOR]), -1)}) - loss(without)
    assert term == pytest.approx(0.0496, abs=1e-4)


def test_an_anchor_holds_the_policy(make):
    """By so much of it, updates that learn the toy without one change next to nothing."""
    ends = []
    for coefficient in (0.0, 100.0):
        training = make(seed=2, anchor=coefficient)
        training.anchor = training.policy().net
        ends.append([training.iterate() for _ in range(4)][-1])
    free, held = ends
    assert free["anchor_kl"] > 0.05
    assert held["anchor_kl"] < 0.1 * free["anchor_kl"]
    assert held["return_mean"] < free["return_mean"] - 0.5
