"""Stock PPO, through Simic's dispatcher, learns on laws what no fixed schedule can: to look and to act on it.

Scores are shares of the gap between the best fixed schedule (chosen on the training instances) and the oracle's
bound, on test instances that neither has seen. Run the long one, and see each seed's shares, with
`pytest tests/pipelines/test_learning.py -m slow -s`.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from esper.pipelines import policy
from esper.platform.spec import RunSpec, load_spec
from esper.policies.simic.fleet import LocalFleet
from esper.policies.simic.policy import FILE
from esper.policies.simic.ppo import PPOTraining
from esper.workers.instances import instance_set
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.observe import telemetry_space
from esper.workers.worker import EpisodeWorker

WORKERS = 64
SMALL = ["budget.decisions=6", "growth.max_layers=4", "ppo.iterations=16", "ppo.decisions=384", "ppo.minibatch=128"]
SMALL += ["growth.blueprints.attention.heads=4", "growth.blueprints.ffn.width=128", "ppo.hidden=32"]
SMALL += ["ppo.learning_rate=0.002"]
SMALL += [
    "laws.heads=[0.3,0.3]",
    "laws.width=[1.2,1.2]",
    "laws.layer=[0.3,0.3]",
]  # worth of a kind, which nothing shows
LARGE = ["ppo.iterations=80", "ppo.decisions=1024", "ppo.minibatch=256"]


def train(spec: RunSpec, seed: int, out: Path) -> None:
    """Leave in a folder what PPO learns on the training instances."""
    instances = list(instance_set("train", spec).values())
    fleet = partial(LocalFleet, lambda: EpisodeWorker(partial(SurrogateRun, spec)), WORKERS)
    in_turn = lambda number: instances[number % len(instances)]  # noqa: E731
    training = PPOTraining(spec, telemetry_space(spec), fleet, seed=seed, instances=in_turn)
    try:
        for _ in range(spec.ppo.iterations):
            training.iterate()
        training.policy().save(out / "checkpoints" / f"{spec.ppo.iterations:06d}" / FILE, {})
    finally:
        training.stop()
    (out / "spec.json").write_text(spec.model_dump_json())


@pytest.mark.parametrize(
    ("settings", "seeds", "least"),
    [
        pytest.param(SMALL, 1, 0.25, id="seconds"),
        pytest.param(LARGE, 3, 0.5, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_ppo_closes_a_share_of_the_gap_that_no_schedule_can(tmp_path, settings, seeds, least):
    shares = []
    for seed in range(seeds):
        out, found = tmp_path / f"ppo{seed}", tmp_path / f"evaluation{seed}"
        train(load_spec("tinystories-char", settings), seed, out)
        assert policy.main(["evaluate", str(out), "--arms", "schedule,bound", "--out", str(found)]) == 0
        rows = {row["arm"]: row for row in json.loads((found / "evaluation.json").read_text())["rows"]}
        assert rows["schedule"]["to_bound"] >= 0.02  # nats
        shares.append(rows["ppo"]["closed"])
        print(f"seed {seed}: closed {shares[-1]:.0%}")
    assert np.mean(shares) >= least
