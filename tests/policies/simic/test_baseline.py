"""The baseline: shaping changes no preference, takes out what globals tell, and never looks ahead."""

from dataclasses import replace

import numpy as np
import pytest

from esper.platform.telemetry import GLOBALS
from esper.policies.simic.baseline import Baseline
from esper.policies.simic.episode import Played

LOSS = GLOBALS.index("loss")


def episode(random: np.random.Generator, instance: str | None = None, end: float = 0.0, decisions: int = 12) -> Played:
    """Rewards that are drops of a loss of nats, and globals that show it; `end` is gained at the end, and not shown."""
    loss = 1.5 + 3 * np.exp(-np.arange(decisions + 1) / 2) + 0.05 * random.standard_normal(decisions + 1)
    states = np.zeros((decisions + 1, len(GLOBALS)), np.float32)
    states[:, LOSS] = loss / 4.5
    rewards = -np.diff(loss)
    rewards[-1] += end
    unused = np.zeros(decisions)
    return Played(0, instance, {"globals": states}, *[unused] * 5, rewards, True, unused, unused)


def shape(made: Baseline, played: list[Played]) -> list[np.ndarray]:
    return made.shaped(played, made.potentials(played))


@pytest.fixture
def baseline() -> Baseline:
    random, made = np.random.default_rng(0), Baseline()
    for _ in range(5):
        made.update([episode(random) for _ in range(10)])
    return made


def test_returns_differ_by_the_potentials_at_the_ends_and_the_unit_only(baseline: Baseline):
    one = episode(np.random.default_rng(1))
    potential, both = baseline.potential(one.states), [one, replace(one, terminated=False)]
    for shaped, last in zip(shape(baseline, both), (0.0, potential[-1]), strict=True):
        expected = (one.rewards.sum() + last - potential[0]) / baseline.scale
        assert shaped.sum() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_what_the_loss_tells_is_taken_out_and_the_rest_has_unit_scale(baseline: Baseline):
    random = np.random.default_rng(9)
    played = [episode(random) for _ in range(100)]
    raw = np.concatenate([one.to_come for one in played])
    left = np.concatenate([np.cumsum(each[::-1])[::-1] for each in shape(baseline, played)])
    assert left.std() * baseline.scale < 0.1 * raw.std()
    assert left.std() == pytest.approx(1, rel=0.2)
    assert abs(left.mean()) < 0.2


@pytest.mark.parametrize("batches", [0, 4])
def test_no_return_is_compared_with_itself(batches):
    """What an episode gains at its end is its own last reward, and moves nothing else: from the first batch on."""
    random, made = np.random.default_rng(0), Baseline()
    for _ in range(batches):
        made.update([episode(random, f"i{i}") for i in range(8)])
    played = [episode(random, f"i{i % 8}") for i in range(16)]
    before = shape(made, played)
    for i in (0, 5, 15):
        rewards = played[i].rewards.copy()
        rewards[-1] += 1.0
        after = shape(made, [*played[:i], replace(played[i], rewards=rewards), *played[i + 1 :]])
        np.testing.assert_array_equal(after[i][:-1], before[i][:-1])
        assert after[i][-1] > before[i][-1]


def test_which_instance_is_played_is_taken_out(baseline: Baseline):
    """Instances end up to a nat apart, which no global tells."""
    random, made = np.random.default_rng(0), Baseline()
    luck = random.standard_normal(8) / 2
    for _ in range(12):
        made.update([episode(random, f"i{i}", luck[i]) for i in range(8)])
    gains = 0.3 * random.choice([-1, 1], 8)
    played = [episode(random, f"i{i}", luck[i] + gains[i]) for i in range(8)]
    left = np.array([each.sum() for each in shape(made, played)]) * made.scale
    assert (left * np.sign(gains)).mean() == pytest.approx(0.3, abs=0.05)
    assert np.abs(left - gains).mean() < np.abs(luck).mean() / 3
