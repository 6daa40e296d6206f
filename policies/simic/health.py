"""Health: recognises a failing training from its metrics, in sentences that say what to do.

Thresholds: none of 15 trainings that learned is warned of; all of five toys that lost what they had learned are.
Sources: Schulman et al. 2017 (1707.06347); stable-baselines3 `docs/common/logger.rst`; RLlib 2.60's PPO.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import fmean, median

from esper.platform.telemetry import GROWTH_KINDS, OPERATIONS

KL_TARGET = 0.01  # RLlib's default, which `learner.py` keeps
LOSSES = ("failures", "late", "refused", "dropped", "unsaved")
CALM = 5  # looks without a condition after which it may be warned of again
KINDS = tuple(name for name in (*OPERATIONS, *GROWTH_KINDS) if name != "graft")  # a graft is told by what it adds
EXPLORE = "with a higher ppo.entropy or a lower ppo.learning_rate"

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
        for condition, sentence in rules(self):
            if look - self._held.get(condition, -CALM) > CALM:
                new.append(sentence)
            self._held[condition] = look
        return new

    def last(self, name: str, n: int, skip: int = 0) -> list[float]:
        """A metric's `n` values before the latest `skip`; empty if one is missing."""
        end = len(self.all) - skip
        window = self.all[end - n : end] if end >= n else []
        return [metrics[name] for metrics in window] if all(name in metrics for metrics in window) else []

    def held(self, name: str, n: int, test: Callable[[float], bool]) -> bool:
        """Whether a metric passed a test `n` times in a row."""
        values = self.last(name, n)
        return bool(values) and all(map(test, values))

    def middle(self, name: str, n: int, default: float) -> float:
        """Median of a metric's latest `n` values."""
        return median(self.last(name, n) or [default])

    def settled(self) -> bool:
        """Whether entropy is below 5 % of its start; healthy trainings keep 22 % through their first half."""
        first = max((metrics.get("entropy", 0.0) for metrics in self.all[:3]), default=0.0)
        return self.held("entropy", 3, lambda entropy: entropy < 0.05 * first)

    def risen(self) -> bool:
        """Whether the last third of the returns (at most 10) is over two standard errors above the first."""
        returns = [metrics["return_mean"] for metrics in self.all if "return_mean" in metrics]
        n = min(10, len(returns) // 3)
        noise = fmean((b - a) ** 2 for a, b in pairwise(returns)) / 2 if n else 0.0  # a trend hardly touches it
        return n > 0 and fmean(returns[-n:]) - fmean(returns[:n]) > 2 * math.sqrt(2 * noise / n)


def rules(health: Health) -> Iterator[tuple[str, str]]:
    """The conditions that hold now, each with its sentence."""
    now, looks = health.all[-1], len(health.all)
    if odd := [name for name, value in now.items() if not math.isfinite(value)]:
        yield (
            "not finite",
            f"{', '.join(odd)} not finite: an update has thrown the policy or the value far off; start again from an "
            "earlier checkpoint with a lower ppo.learning_rate.",
        )
    for kind in KINDS:  # the share alone would flag a good schedule that grafts once in a long episode
        others = 0.5 / fmean(health.last("episode_length", 3) or [1.0])
        if health.held(kind, 3, lambda share, others=others: share > max(0.98, 1 - others)):
            yield (
                "collapsed",
                f"the controller always chooses the same ({kind}, {now[kind]:.1%} of its decisions): look at the "
                "return; unless that is the best there is, as `esper sweep --arms static,lag` would show, start again "
                f"{EXPLORE}.",
            )
    if (health.iterations is None or looks < health.iterations / 2) and health.settled():
        yield (
            "deterministic early",
            f"the policy is as good as deterministic (entropy {now['entropy']:.3f}) and explores no more: if its "
            f"return is what you hoped for, stop here; else start again {EXPLORE}.",
        )
    explained = health.middle("explained_variance", 8, 1.0)  # a constant explains 0
    if looks >= 20 and explained <= 0.05 and not health.risen():  # healthy values may be so where returns are chance
        yield (
            "value blind",
            f"explained variance is near 0 (median {explained:+.2f} of 8 iterations) and the return has not risen: "
            "advantages are noise; try more ppo.decisions per iteration, more ppo.epochs, or another "
            "ppo.learning_rate.",
        )
    kl, usual = now.get("kl", 0.0), health.middle("kl", 3, 0.0)
    kl = kl if kl > 20 * KL_TARGET else usual  # healthy: 11 times once, 6 usually; four toys lost all at 30 and more
    if math.isfinite(kl) and kl > 10 * KL_TARGET:
        yield (
            "update too large",
            f"updates move the policy too far (KL {kl:.3g}, target {KL_TARGET}): look at the return and at lag_mean; "
            "try a lower ppo.learning_rate or fewer ppo.epochs.",
        )
    if health.held("kl", 5, lambda kl: kl < KL_TARGET / 20) and not health.settled():  # healthy: one of 5 above 0.0058
        yield (
            "no update",
            f"updates hardly change the policy (KL {now['kl']:.2g} for 5 iterations, target {KL_TARGET}): try a "
            "higher ppo.learning_rate, or a lower ppo.entropy if entropy stays high.",
        )
    clipped = health.middle("clip_fraction", 5, 0.0)
    if clipped > 0.7:  # healthy: 0.55 at most; stable-baselines3's example has 0.24
        yield (
            "clipped",
            f"{clipped:.0%} of the decisions are clipped: an update moves them further than ppo.clip and goes on "
            "without them; look at KL and lag_mean; try fewer ppo.epochs or a lower ppo.learning_rate.",
        )
    lag, before = health.last("lag_mean", 5), health.last("lag_mean", 5, skip=5)
    if lag and before and fmean(lag) > max(2.0, 1.5 * fmean(before)):
        yield (
            "lag grows",
            f"decisions are learned from later and later ({fmean(lag):.1f} updates after they were made, before that "
            f"{fmean(before):.1f}): look for slow workers and long episodes; try more ppo.decisions per iteration.",
        )
    if looks >= 5 and health.held("busy", 3, lambda busy: busy < 0.5):  # 2 iterations to start
        learning = now.get("learn_seconds", 0.0)
        cause = (
            f"the learner takes {learning:.1f} s an update: give it a core of its own, or use fewer workers"
            if learning > now.get("sample_seconds", 0.0)
            else "look at failures and late, and whether workers are still starting; try fewer of them to a node"
        )
        yield "idle", f"workers are busy only {now['busy']:.0%} of the time: {cause}."
    rises = {name: [b - a for a, b in pairwise(health.last(name, 6))] for name in LOSSES}
    ended = sum(health.last("episodes", 5))  # a node that goes away is one rise, and no reason to worry
    often = [name for name in LOSSES if sum(r > 0 for r in rises[name]) >= 3 and sum(rises[name]) > 0.1 * ended]
    if often:
        told = ", ".join(f"{name} +{sum(rises[name]):.0f}" for name in often)
        yield (
            "losses",
            f"the fleet keeps losing work ({told} in 5 iterations): look at what was said of the workers above, their "
            "memory and their disks; try fewer workers to a node, or a longer fleet.deadline.",
        )
