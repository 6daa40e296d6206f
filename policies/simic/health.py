"""Health: recognises a failing training from its metrics, in sentences that say what to do.

Thresholds: none of 15 trainings that learned is warned of; all of five toys that lost what they had learned are.
Sources: Schulman et al. 2017 (1707.06347); stable-baselines3 `docs/common/logger.rst`; RLlib 2.60's PPO.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean, median

from esper.platform.telemetry import GROWTH_KINDS, OPERATIONS

KL_TARGET = 0.01  # RLlib's default, which `learner.py` keeps
LOSSES = ("failures", "late", "refused", "dropped", "unsaved")
CALM = 5  # looks without a condition after which it may be warned of again
KINDS = tuple(name for name in (*OPERATIONS, *GROWTH_KINDS) if name != "graft")  # a graft is told by what it adds
EXPLORE = "start again with a higher ppo.entropy or a lower ppo.learning_rate"

Metrics = dict[str, float]


class Health:
    """Warns once of each condition, again after `CALM` looks without it; `iterations` tells early from late."""

    def __init__(self, iterations: int | None = None) -> None:
        self.iterations = iterations
        self.all: list[Metrics] = []  # not all have every metric
        self._held: dict[str, int] = {}  # condition → the last look at which it held

    def look(self, metrics: Metrics) -> list[str]:
        """Take in an iteration's `iteration_metrics`; returns the new warnings."""
        self.all.append(metrics)
        look, new = len(self.all), []
        for condition, sentence in (*of_policy(self), *of_updates(self), *of_fleet(self)):
            if look - self._held.get(condition, -CALM) > CALM:
                new.append(sentence)
            self._held[condition] = look
        return new

    def last(self, name: str, n: int, skip: int = 0) -> list[float]:
        """A metric's `n` values before the latest `skip`; empty if one is missing."""
        values = [metrics[name] for metrics in self.all[: len(self.all) - skip][-n:] if name in metrics]
        return values if len(values) == n else []

    def settled(self) -> bool:
        """Whether entropy is below 5 % of its start; healthy trainings keep 22 % through their first half."""
        first = max((metrics.get("entropy", 0.0) for metrics in self.all[:3]), default=0.0)
        last = self.last("entropy", 3)
        return bool(last) and max(last) < 0.05 * first

    def risen(self) -> bool:
        """Whether the last third of the returns (at most 10) is over two standard errors above the first."""
        returns = [metrics["return_mean"] for metrics in self.all if "return_mean" in metrics]
        n = min(10, len(returns) // 3)
        noise = fmean((b - a) ** 2 for a, b in pairwise(returns)) / 2 if n else 0.0  # a trend hardly touches it
        return n > 0 and fmean(returns[-n:]) - fmean(returns[:n]) > 2 * math.sqrt(2 * noise / n)


def of_policy(health: Health) -> Iterator[tuple[str, str]]:
    """The conditions of policy and value that hold now, each with its sentence."""
    now, looks = health.all[-1], len(health.all)
    if odd := [name for name, value in now.items() if not math.isfinite(value)]:
        told = f"{', '.join(odd)} not finite: an update has thrown the policy or the value far off; start again "
        yield "not finite", told + "from an earlier checkpoint with a lower ppo.learning_rate."
    others = 0.5 / fmean(health.last("episode_length", 3) or [1.0])  # a good schedule may graft once in a long episode
    for kind in KINDS:
        if min(health.last(kind, 3), default=0.0) > max(0.98, 1 - others):
            told = f"the controller always chooses the same ({kind}, {now[kind]:.1%} of its decisions): unless that is "
            yield "collapsed", told + f"the best, as `esper sweep --arms static,lag` would show, {EXPLORE}."
    if (health.iterations is None or looks < health.iterations / 2) and health.settled():
        told = f"the policy is as good as deterministic (entropy {now['entropy']:.3f}) and explores no more: unless "
        yield "deterministic early", told + f"its return is what you hoped for, {EXPLORE}."
    explained = median(health.last("explained_variance", 8) or [1.0])  # a constant explains 0
    if looks >= 20 and explained <= 0.05 and not health.risen():  # healthy values may be so where returns are chance
        told = f"explained variance is near 0 (median {explained:+.2f} of 8 iterations) and the return has not risen: "
        yield "value blind", told + "try more ppo.decisions, more ppo.epochs, or another ppo.learning_rate."


def of_updates(health: Health) -> Iterator[tuple[str, str]]:
    """The conditions of the updates."""
    kl, few = health.all[-1].get("kl", 0.0), health.last("kl", 3)
    # Healthy: 11 times the target once, 6 usually; four toys lost all at 30 and more.
    large = kl if kl > 20 * KL_TARGET else median(few or [0.0])
    if math.isfinite(large) and large > 10 * KL_TARGET:
        told = f"updates move the policy too far (KL {large:.3g}, target {KL_TARGET}): look at the return and "
        yield "update too large", told + "lag_mean; try a lower ppo.learning_rate or fewer ppo.epochs."
    if max(health.last("kl", 5), default=1.0) < KL_TARGET / 20 and not health.settled():  # healthy: one of 5 > 0.0058
        told = f"updates hardly change the policy (KL {kl:.2g} for 5 iterations, target {KL_TARGET}): try a higher "
        yield "no update", told + "ppo.learning_rate, or a lower ppo.entropy if entropy stays high."
    clipped = median(health.last("clip_fraction", 5) or [0.0])
    if clipped > 0.7:  # healthy: 0.55 at most; stable-baselines3's example has 0.24
        told = f"{clipped:.0%} of the decisions are clipped: an update moves them further than ppo.clip; look at "
        yield "clipped", told + "KL and lag_mean; try fewer ppo.epochs or a lower ppo.learning_rate."


def of_fleet(health: Health) -> Iterator[tuple[str, str]]:
    """The conditions of the fleet."""
    now = health.all[-1]
    lag, before = health.last("lag_mean", 5), health.last("lag_mean", 5, skip=5)
    if lag and before and fmean(lag) > max(2.0, 1.5 * fmean(before)):
        told = f"decisions are learned from later and later ({fmean(lag):.1f} updates after they were made): look for "
        yield "lag grows", told + "slow workers and long episodes; try more ppo.decisions per iteration."
    if len(health.all) >= 5 and max(health.last("busy", 3), default=1.0) < 0.5:  # 2 iterations to start
        learning = now.get("learn_seconds", 0.0)
        cause = "look at failures and late, and whether workers are still starting; try fewer of them to a node"
        if learning > now.get("sample_seconds", 0.0):
            cause = f"the learner takes {learning:.1f} s an update: give it a core of its own, or use fewer workers"
        yield "idle", f"workers are busy only {now['busy']:.0%} of the time: {cause}."
    rises = {name: [b - a for a, b in pairwise(health.last(name, 6))] for name in LOSSES}
    ended = sum(health.last("episodes", 5))  # a node that goes away is one rise, and no reason to worry
    often = [name for name in LOSSES if sum(r > 0 for r in rises[name]) >= 3 and sum(rises[name]) > 0.1 * ended]
    if often:
        told = f"the fleet keeps losing work ({', '.join(f'{name} +{sum(rises[name]):.0f}' for name in often)} in 5 "
        yield "losses", told + "iterations): look at what was said of the workers; try fewer to a node, or more memory."
