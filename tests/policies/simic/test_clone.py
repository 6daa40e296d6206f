"""Cloning: labels from a teacher's forecasts, and a network that learns them.

Alone: `pytest tests/policies/simic/test_clone.py`.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from simic_toy import DECISIONS, SPACE, ToyRun

from esper.platform.telemetry import GLOBALS
from esper.policies.simic.baseline import Baseline
from esper.policies.simic.clone import TEMPERATURE, agreement, choice, teach, untaught
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.episode import Played
from esper.policies.simic.fleet import LocalFleet
from esper.workers.worker import EpisodeWorker
from tests.pipelines.helpers import made_net


def test_labels_by_hand():
    """WAIT against the best row is one choice, what to graft another; of equal rows the last; ∞ is never chosen."""
    finals = 1.3 + TEMPERATURE * np.log([1, 3, 2, 3, math.inf, 4])  # e times as likely a temperature lower
    chances = torch.from_numpy(choice(finals, 8)).softmax(dim=-1).numpy()
    acting = {2: 1 / 2, 3: 1 / 3, 5: 1 / 4}  # in proportion, 13/12 in all
    expected = [2 / 3, *[acting.get(row, 0.0) * 12 / 13 / 3 for row in range(1, 8)]]
    np.testing.assert_allclose(chances, expected, atol=1e-6)
    alone = torch.from_numpy(choice(np.array([1.3, math.inf]), 4)).softmax(dim=-1)
    assert alone.tolist() == [1, 0, 0, 0]


def lessons(seed: int, number: int) -> list[Played]:
    """Episodes of the toy, with labels that prefer the row that pays."""
    fleet = LocalFleet(lambda: EpisodeWorker(ToyRun), 1)
    episodes = Dispatcher(fleet, made_net(), SPACE, seed=seed, ahead=10_000).collect(number * DECISIONS)
    pays = {sign: np.where(np.arange(3) == row, 0.99, [1.0, 1.01, 1.01]) for sign, row in ((1, 1), (-1, 2))}
    signs = [each.states[:-1, GLOBALS.index("slope_fast")] for each in episodes]
    labels = [np.array([choice(pays[sign], 5) for sign in own]) for own in signs]
    return [replace(each, logits=own) for each, own in zip(episodes, labels, strict=True)]


def test_a_clone_plays_as_its_teacher_and_is_the_same_each_time(monkeypatch):
    monkeypatch.setattr("esper.policies.simic.clone.STEPS", 200)
    nets, baseline, episodes = [untaught(16, 5), untaught(16, 5)], Baseline(), lessons(0, 40)
    baseline.update(episodes)
    unseen = lessons(1, 10)
    assert agreement(nets[0], unseen) < 0.9
    for net in nets:
        torch.rand(3)  # whatever the process draws beside
        teach(net, episodes, baseline, 7, lambda: None)
    assert agreement(nets[0], unseen) > 0.98
    waits = [replace(each, logits=np.tile(choice(np.array([1.3, 1.4]), 5), (len(each), 1))) for each in unseen]
    assert agreement(nets[0], waits) == 0  # where to graft was worse: a choice too
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert untaught(16, 6).score[0].weight.ne(untaught(16, 5).score[0].weight).any()  # pyright: ignore


def test_a_stop_ends_the_lessons():
    def stop() -> None:
        raise KeyboardInterrupt

    episodes, baseline = lessons(0, 1), Baseline()
    baseline.update(episodes)
    with pytest.raises(KeyboardInterrupt):
        teach(untaught(8, 0), episodes, baseline, 0, stop)
