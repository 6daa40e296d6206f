"""Stock PPO, through Simic's dispatcher, learns on laws what no fixed schedule can: to look and to act on it.

Scores are shares of the gap between the best fixed schedule (chosen on the training instances) and the clairvoyant
bound, on test instances that neither has seen. Run the long one, and see each seed's shares, with
`pytest tests/pipelines/test_learning.py -m slow -s`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import ray

from esper.platform.contracts import GrowthPolicy
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec, load_spec
from esper.policies.schedule import Entry, SchedulePolicy
from esper.policies.simic.fleet import LocalFleet
from esper.policies.simic.learner import build_algorithm, current_policy
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import SimicPolicy
from esper.workers.candidates import telemetry_space
from esper.workers.instances import instance_set
from esper.workers.laws.best_schedule import best_fixed_schedule
from esper.workers.laws.oracle import bound
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.worker import EpisodeWorker

WORKERS = 64


@contextmanager
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def trained(spec: RunSpec, seed: int) -> ControllerNet:
    """What PPO learns on the training instances."""
    instances = list(instance_set("train", spec).values())
    algorithm = build_algorithm(
        spec,
        telemetry_space(spec),
        partial(LocalFleet, lambda: EpisodeWorker(partial(SurrogateRun, spec)), WORKERS),
        seed=seed,
        instances=lambda number: instances[number % len(instances)],
    )
    try:
        for _ in range(spec.ppo.iterations):
            algorithm.train()
        return current_policy(algorithm).net
    finally:
        algorithm.stop()


class Ruler:
    """Measures policies on the test instances."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.instances = list(instance_set("test", spec).values())
        best = best_fixed_schedule(spec, instance_set("train", spec).values())
        self.fixed = self.loss(SchedulePolicy([Entry(at=at, blueprint=blueprint) for at, blueprint in best]))
        self.bound = np.mean([bound(spec, instance) for instance in self.instances])

    def loss(self, policy: GrowthPolicy) -> float:
        """The mean final loss, nats."""
        run, losses = SurrogateRun(self.spec), []
        for number, instance in enumerate(self.instances):
            telemetry = run.reset(instance, derive(0, "test", number))
            while not run.ended:
                telemetry = run.step(policy.act(telemetry)).telemetry
            losses.append(run.loss)
        return float(np.mean(losses))

    def share(self, policy: GrowthPolicy) -> float:
        """Of the gap, that a policy closes: 0 is the best fixed schedule, 1 the bound."""
        return float((self.fixed - self.loss(policy)) / (self.fixed - self.bound))

    def shares(self, net: ControllerNet) -> tuple[float, float]:
        """Of the likeliest actions, and of drawn ones."""
        drawn = SimicPolicy(net, sample=True, rng=np.random.default_rng(0))
        return self.share(SimicPolicy(net)), self.share(drawn)


def test_ppo_beats_the_best_schedule_in_seconds():
    """A small problem: 6 decisions, at most 2 layers."""
    spec = load_spec(
        "tinystories-char",
        [
            "budget.decisions=6",
            "growth.max_layers=2",
            "growth.blueprints.attention.heads=4",
            "growth.blueprints.ffn.width=128",
            "ppo.iterations=16",
            "ppo.decisions=384",
            "ppo.minibatch=128",
            "ppo.learning_rate=0.002",
            "ppo.entropy=0.005",
            "ppo.hidden=32",
        ],
    )
    ruler = Ruler(spec)
    with local_ray():
        greedy, drawn = ruler.shares(trained(spec, seed=0))
    print(f"gap {ruler.fixed - ruler.bound:.3f} nats; closed: greedy {greedy:.0%}, drawn {drawn:.0%}")
    assert greedy > 0.25


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ppo_closes_half_of_the_gap_over_three_seeds():
    spec = load_spec(
        "tinystories-char",
        ["ppo.iterations=80", "ppo.decisions=1024", "ppo.minibatch=256", "ppo.entropy=0.005"],
    )
    ruler = Ruler(spec)
    assert ruler.fixed - ruler.bound >= 0.05
    print(f"\nbest fixed schedule {ruler.fixed:.3f}, bound {ruler.bound:.3f}")
    found = []
    with local_ray():
        for seed in range(3):
            found.append(ruler.shares(trained(spec, seed)))
            print(f"seed {seed}: greedy {found[-1][0]:.0%}, drawn {found[-1][1]:.0%}")
    greedy, drawn = np.mean(found, axis=0)
    print(f"mean: greedy {greedy:.0%}, drawn {drawn:.0%}")
    assert greedy >= 0.5
    assert drawn >= 0.5
