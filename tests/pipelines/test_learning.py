"""Stock PPO, through Simic's dispatcher, learns on laws what no fixed schedule can: to look and to act on it.

Scores are shares of the gap between the best fixed schedule (chosen on the training instances) and the oracle's
bound, on test instances that neither has seen. Run the long one, and see each seed's shares, with
`pytest tests/pipelines/test_learning.py -m slow -s`.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from esper.pipelines.controllers.evaluation import Evaluation
from esper.platform import cluster
from esper.platform.contracts import GrowthPolicy
from esper.platform.spec import RunSpec, load_spec
from esper.policies.schedule import SchedulePolicy
from esper.policies.simic.fleet import LocalFleet
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import SimicPolicy
from esper.policies.simic.ppo import PPOTraining
from esper.workers.instances import instance_set
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.observe import telemetry_space
from esper.workers.worker import EpisodeWorker

WORKERS = 64


def trained(spec: RunSpec, seed: int) -> ControllerNet:
    """What PPO learns on the training instances."""
    instances = list(instance_set("train", spec).values())
    training = PPOTraining(
        spec,
        telemetry_space(spec),
        partial(LocalFleet, lambda: EpisodeWorker(partial(SurrogateRun, spec)), WORKERS),
        seed=seed,
        instances=lambda number: instances[number % len(instances)],
    )
    try:
        for _ in range(spec.ppo.iterations):
            training.iterate()
        return training.policy().net
    finally:
        training.stop()


def share(spec: RunSpec, seeds: range) -> float:
    """Of the gap, that the policies close on average: 0 is the schedule, 1 the bound."""
    tests = Evaluation(spec, instance_set("test", spec), partial(SurrogateRun, spec))

    def loss(policy: GrowthPolicy) -> float:
        return float(np.mean([run["val_loss"] for run in tests.play("learning", lambda seed: policy)]))

    fixed = loss(SchedulePolicy(replace(tests, instances=instance_set("train", spec)).best_schedule()))
    gap, found = fixed - float(tests.bounds().mean()), []
    assert gap >= 0.02
    with cluster.session(cpus=1):
        for seed in seeds:
            found.append((fixed - loss(SimicPolicy(trained(spec, seed)))) / gap)
            print(f"seed {seed}: gap {gap:.3f} nats; closed: {found[-1]:.0%}")
    return float(np.mean(found))


def test_ppo_beats_the_best_schedule_in_seconds():
    """A small problem: 6 decisions, at most 2 layers."""
    small = ["budget.decisions=6", "growth.max_layers=2", "ppo.iterations=16", "ppo.decisions=384", "ppo.minibatch=128"]
    coarse = ["growth.blueprints.attention.heads=4", "growth.blueprints.ffn.width=128", "ppo.hidden=32"]
    spec = load_spec("tinystories-char", [*small, *coarse, "ppo.learning_rate=0.002"])
    assert share(spec, range(1)) > 0.25


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ppo_closes_half_of_the_gap_over_three_seeds():
    spec = load_spec("tinystories-char", ["ppo.iterations=80", "ppo.decisions=1024", "ppo.minibatch=256"])
    assert share(spec, range(3)) >= 0.5
