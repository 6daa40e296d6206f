"""Stock PPO, through Simic's dispatcher, learns on laws what no fixed schedule can: to look and to act on it.

Scores are shares of the gap between the best fixed schedule (chosen on the training instances) and the oracle's
bound, on test instances that neither has seen. Run the long one, and see each seed's shares, with
`pytest tests/pipelines/test_learning.py -m slow -s`.
"""

import numpy as np
import pytest

from esper.pipelines import policy, ppo
from tests.pipelines.helpers import read, sets

SMALL = ["budget.decisions=6", "growth.max_layers=4", "ppo.iterations=16", "ppo.decisions=384", "ppo.minibatch=128"]
SMALL += ["growth.blueprints.attention.heads=4", "growth.blueprints.ffn.width=128", "ppo.hidden=32"]
SMALL += ["ppo.learning_rate=0.002", "ppo.held_out=0"]
SMALL += ["laws.heads=[0.3,0.3]", "laws.width=[1.2,1.2]", "laws.layer=[0.3,0.3]"]  # which nothing shows


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("settings", "seeds", "least"),
    [
        pytest.param(SMALL, 1, 0.25, id="seconds"),
        pytest.param([], 3, 0.5, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_ppo_closes_a_share_of_the_gap_that_no_schedule_can(tmp_path, settings, seeds, least):
    shares = []
    for seed in range(seeds):
        out, found = tmp_path / f"ppo{seed}", tmp_path / f"evaluation{seed}"
        assert ppo.main(["--surrogate", *sets(*settings), "--seed", str(seed), "--out", str(out)]) == 0
        assert policy.main(["evaluate", str(out), "--arms", "schedule,bound", "--out", str(found)]) == 0
        rows = {row["arm"]: row for row in read(found, "evaluation.json")["rows"]}
        assert rows["schedule"]["to_bound"] >= 0.02  # nats
        shares.append(rows["ppo"]["closed"])
        print(f"seed {seed}: closed {shares[-1]:.0%}")
    assert np.mean(shares) >= least
