"""Warnings of degenerate training: each condition on made-up metrics, and one on PPO that is driven into it."""

import pytest

from esper.policies.simic.health import Health


def warnings(history: list[dict[str, float]], iterations: int | None = None) -> list[str]:
    """All warnings of a training, in order."""
    health = Health(iterations)
    return [warning for metrics in history for warning in health.look(metrics)]


def healthy(n: int = 24) -> list[dict[str, float]]:
    """Metrics of a training that goes well, of `n` iterations."""
    steady = {"episodes": 11.0, "episode_length": 24.0, "wait": 0.8, "graft": 0.2, "layer": 0.2, "kl": 0.01}
    steady |= {"clip_fraction": 0.1, "lag_mean": 1.0, "busy": 0.95, "sample_seconds": 5.0, "learn_seconds": 1.0}
    returns = [2.5 + i / 50 + 0.03 * (-1) ** i for i in range(n)]
    rest = [{"explained_variance": i / 20 - 0.5, "entropy": 1 - i / 40, "failures": i // 10} for i in range(n)]
    return [{**steady, **rest[i], "return_mean": returns[i]} for i in range(n)]


def changed(after: int = 10, **metrics: list[float] | float) -> list[dict[str, float]]:
    """The same, with other values: throughout, or those of a list from an iteration on."""
    history = healthy()
    for name, values in metrics.items():
        begin, values = (after, values) if isinstance(values, list) else (0, [values] * len(history))
        for i, value in enumerate(values):
            history[begin + i][name] = value
    return history


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        (changed(value_loss=[float("nan")]), "value_loss not finite"),
        (changed(wait=[1.0] * 14), "always chooses the same (wait, 100.0%"),
        (changed(entropy=[0.01] * 14, after=5), "as good as deterministic (entropy 0.010)"),
        (changed(kl=[0.3]), "too far (KL 0.3,"),  # one such update has lost a toy all it had learned
        (changed(kl=[1e-5] * 14), "hardly change the policy (KL 1e-05"),
        (changed(clip_fraction=[0.9, 0.1, 0.8, 0.95]), "80% of the decisions are clipped"),
        (changed(lag_mean=[1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]), "later and later"),
        (changed(busy=[0.3] * 14), "busy only 30% of the time: look at failures"),
        (changed(busy=[0.3] * 14, learn_seconds=[9.0] * 14), "the learner takes 9.0 s an update"),
        (changed(failures=[3.0, 5.0, 7.0, 9.0, 11.0]), "losing work (failures +"),
        (healthy(40), None),
        (changed(wait=63 / 64, layer=1 / 64, episode_length=64.0), None),  # one graft in a long episode
        (changed(wait=255 / 256, layer=1 / 256, episode_length=64.0), "always chooses the same (wait, 99.6%"),
        (changed(explained_variance=-0.02), None),  # the return rises: there was nothing to explain
        (changed(explained_variance=-0.02, return_mean=2.5), "explained variance is near 0 (median -0.02"),
        ([{"return_mean": 1.0}] * 30, None),  # metrics that are not there are no illness
    ],
)
def test_each_condition_is_told_in_one_sentence(history, sentence):
    told = warnings(history, iterations=100)
    assert len(told) == (sentence is not None)
    assert not told or sentence in told[0]


def test_late_in_training_a_settled_policy_is_as_it_should_be():
    settled = changed(after=14, entropy=[0.01] * 10)
    assert warnings(settled, iterations=24) == []
    assert len(warnings(settled, iterations=100)) == 1


def test_a_condition_is_told_once_until_it_has_been_away():
    bad, good = {**healthy()[0], "kl": 5.0}, healthy()[0]
    health = Health()
    told = [len(health.look(metrics)) for metrics in [bad] * 3 + [good] * 4 + [bad] + [good] * 5 + [bad]]
    assert told == [1, 0, 0, *[0] * 4, 0, *[0] * 5, 1]


def test_ppo_really_driven_there_is_told_of(make):
    training = make(learning_rate=1.0)
    assert any("always chooses the same" in each for each in warnings([training.iterate() for _ in range(6)], 6))
