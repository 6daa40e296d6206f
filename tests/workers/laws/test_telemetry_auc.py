"""Whether a surrogate's telemetry can be told from a run's, by a classifier that sees what a learned policy does.

Alone, with the numbers: `pytest tests/workers/laws/test_telemetry_auc.py -m slow -s`: two minutes.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from esper.pipelines.common.play import play
from esper.platform.contracts import GraftAction
from esper.platform.data_spec import DataSpec
from esper.platform.spec import load_spec
from esper.policies.random import RandomPolicy
from esper.policies.simic.net import ControllerNet
from esper.policies.static import StaticPolicy
from esper.workers.laws.fit import fitted
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData, prepare

RUNS, BUDGETS = 20, (5e4, 1e5)  # even ones to fit laws to, odd ones to be told apart; parameter-seconds
DRAWS = 4  # surrogates for each run


class Followed:
    """Plays rows, or as a policy does, and keeps what is seen."""

    def __init__(self, rows=None, policy=None):
        self.rows, self.policy, self.seen = rows, policy, []

    def act(self, telemetry, probe=None):
        index = self.policy.act(telemetry).index if self.policy else self.rows[telemetry.sequence]
        self.seen.append((telemetry.globals, telemetry.sites, index, telemetry.mask.sum() > 1))
        return GraftAction(index, telemetry.sequence)


def tensors(episodes):
    """Decisions with a choice, as the network's inputs."""
    seen = [each for episode in episodes for each in episode if each[3]]
    return {name: torch.from_numpy(np.stack([each[i] for each in seen])) for i, name in enumerate(("globals", "sites"))}


def auc(real, surrogates, folds=4):
    """Of a fresh policy network's value, taught to tell them, on held-out instances of each; the folds' mean."""
    found = []
    for fold in range(folds):
        ours, theirs, unseen, others = (
            tensors(
                [episode for i, of_one in enumerate(episodes) if (i % folds == fold) is held_out for episode in of_one]
            )
            for held_out in (False, True)
            for episodes in (real, surrogates)
        )
        torch.manual_seed(fold)
        net = ControllerNet()
        optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.01)
        for _ in range(100):
            scores = net.value(ours), net.value(theirs)
            loss = softplus(-scores[0]).mean() + softplus(scores[1]).mean()  # cross-entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            above = net.value(unseen)[:, None] - net.value(others)
        found.append(float((above > 0).double().mean() + (above == 0).double().mean() / 2))
    return float(np.mean(found))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_surrogate_of_fitted_laws_looks_like_a_run(tinystories, tmp_path):
    prepare(DataSpec(source=str(tinystories)), tmp_path / "char")
    data = TokenData.open(tmp_path / "char")
    played, fitted_to = [], []
    for number in range(RUNS):
        budget, layers = BUDGETS[number // 2 % 2], 1 + number // 4 % 3
        own = [f"budget.amount={budget}", f"host.n_layer={layers}", "trainer.compile=off"]
        spec = load_spec("tinystories-char", own)
        policy = StaticPolicy() if number in range(0, 12, 2) else RandomPolicy(number)
        arm, run = Followed(policy=policy), GrowthRun(spec, data)
        run.reset(seed=number)
        summary = play(run, arm, arm="any")
        if number % 2 == 0:
            fitted_to.append((spec, "", summary))
        else:
            played.append((spec, arm.seen))
    laws, _ = fitted(tmp_path, fitted_to)
    found = {}
    for name, given in (("the preset's", None), ("fitted", laws)):
        surrogates = []
        for number, (spec, episode) in enumerate(played):
            surrogates.append([])
            for draw in range(DRAWS):
                arm, run = Followed([row for *_, row, _ in episode]), SurrogateRun(spec, given)
                run.reset(seed=100 * draw + number)
                play(run, arm, arm="any")
                surrogates[-1].append(arm.seen)
        found[name] = auc([[episode] for _, episode in played], surrogates)
        print(f"{name} laws: telemetry AUC {found[name]:.2f} on held-out episodes")
    assert found["fitted"] < 0.7
    assert found["the preset's"] > found["fitted"] + 0.1  # where there is something to see, the classifier sees it
