"""The baseline: shaping changes no preference, takes out what globals tell, and leaves a scale of 1."""

import numpy as np
import pytest

from esper.platform.telemetry import GLOBALS
from esper.policies.simic.baseline import Baseline, places

LOSS = GLOBALS.index("loss")


def episode(random: np.random.Generator, decisions: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (K,) that are drops of a loss of nats, and globals (K + 1, G) that show it."""
    loss = 1.5 + 3 * np.exp(-np.arange(decisions + 1) / 2) + 0.05 * random.standard_normal(decisions + 1)
    states = np.zeros((decisions + 1, len(GLOBALS)), np.float32)
    states[:, LOSS] = loss / 4.5
    return -np.diff(loss), states


def to_come(rewards: np.ndarray) -> np.ndarray:
    return np.cumsum(rewards[::-1])[::-1]


@pytest.fixture
def baseline() -> Baseline:
    random = np.random.default_rng(0)
    made = Baseline()
    for _ in range(5):
        episodes = [episode(random) for _ in range(10)]
        made.update(np.concatenate([s[:-1] for _, s in episodes]), np.concatenate([to_come(r) for r, _ in episodes]))
    return made


def test_fresh_it_changes_nothing():
    rewards, states = episode(np.random.default_rng(1))
    np.testing.assert_allclose(Baseline().shaped(rewards, states, True), rewards, rtol=1e-6)


def test_returns_differ_by_the_first_potential_and_the_unit_only(baseline: Baseline):
    for seed in range(3):
        rewards, states = episode(np.random.default_rng(seed))
        shaped = baseline.shaped(rewards, states, True)
        expected = (rewards.sum() - baseline.potential(states)[0]) / baseline.scale
        assert shaped.sum() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_truncated_episode_keeps_the_last_potential(baseline: Baseline):
    rewards, states = episode(np.random.default_rng(1))
    last = baseline.potential(states)[-1] / baseline.scale
    difference = baseline.shaped(rewards, states, False) - baseline.shaped(rewards, states, True)
    np.testing.assert_allclose(difference, np.eye(len(rewards))[-1] * last, atol=1e-4)


def test_what_the_loss_tells_is_taken_out_and_the_rest_has_unit_scale(baseline: Baseline):
    random = np.random.default_rng(9)
    episodes = [episode(random) for _ in range(100)]
    raw = np.concatenate([to_come(r) for r, _ in episodes])
    left = np.concatenate([to_come(baseline.shaped(r, s, True)) for r, s in episodes])
    assert left.std() * baseline.scale < 0.1 * raw.std()
    assert left.std() == pytest.approx(1, rel=0.2)
    assert abs(left.mean()) < 0.2


def test_state_goes_on(baseline: Baseline):
    other = Baseline()
    other.load(baseline.state())
    _, states = episode(np.random.default_rng(1))
    np.testing.assert_array_equal(other.potential(states), baseline.potential(states))
    assert other.scale == baseline.scale


def test_which_instance_is_played_is_taken_out_too_and_never_by_the_episode_itself():
    """Instances that end 0.5 nats apart, which no global tells; what an episode did beyond that stays."""
    random, made = np.random.default_rng(0), Baseline()
    luck = random.standard_normal(8) / 2

    def play(instance: int, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        rewards, states = episode(random)
        rewards[-1] += luck[instance] + gain
        return rewards, states

    def learn(episodes: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
        at = [place for instance, (rewards, _) in episodes.items() for place in places(instance, len(rewards))]
        states = np.concatenate([s[:-1] for _, s in episodes.values()])
        made.update(states, np.concatenate([to_come(r) for r, _ in episodes.values()]), at)

    for _ in range(12):
        learn({instance: play(instance) for instance in range(8)})
    gains = 0.3 * random.choice([-1, 1], 8)
    played = {instance: play(instance, gain) for instance, gain in enumerate(gains)}
    learn(played)
    shaped = [made.shaped(r, s, True, instance) * made.scale for instance, (r, s) in played.items()]
    left = np.array([each.sum() for each in shaped])
    assert (left * np.sign(gains)).mean() == pytest.approx(0.3, abs=0.05)  # were its own return in the mean: 0.24
    blind = np.array([(made.shaped(r, s, True) * made.scale).sum() for r, s in played.values()])
    assert np.abs(blind - gains).mean() > 3 * np.abs(left - gains).mean()
