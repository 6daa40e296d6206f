"""Health: tells a training that goes wrong, from the metrics of its iterations, in sentences that say what to do.

Each condition below states its threshold and why. "Healthy" are 15 trainings that learned, none of which is warned of:
11 of 20 iterations on the tests' toy run (16 runs, seeds 0 to 7 and 20 to 22), 3 of 25 on the surrogate
(`tinystories-char`, 512 decisions) and one of 80 (`esper ppo --surrogate`, on laws fitted to text). The toy's seeds 8
to 11, of 30 iterations, learned too and then lost it in one update each: all are warned of. So is seed 23, whose last
update was as large. Seeds 20 to 23 were run when thresholds were set. KL and clip fraction are the whole batch's.

Sources: Schulman et al. 2017 (1707.06347); stable-baselines3, `docs/common/logger.rst`; RLlib 2.60, `PPOConfig` and
`PPOTorchLearner._update_module_kl_coeff`.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, median

from esper.platform.telemetry import GROWTH_KINDS, OPERATIONS

KL_TARGET = 0.01  # RLlib's default, which `learner.py` keeps
KL_USUAL, KL_ONCE = 10 * KL_TARGET, 20 * KL_TARGET  # above which 3 updates are too large, and one is
NO_ENTROPY = 0.05  # of what it was at the start
LOSSES = ("failures", "late", "refused", "dropped", "unsaved")
CALM = 5  # looks without a condition after which it may be warned of again
KINDS = tuple(name for name in (*OPERATIONS, *GROWTH_KINDS) if name != "graft")  # a graft is told by what it adds


class History:
    """Metrics of the iterations so far, of which not all have every metric.

    Args:
        iterations: at which the training ends; none if not known.
    """

    def __init__(self, iterations: int | None = None) -> None:
        self.iterations = iterations
        self.all: list[dict[str, float]] = []

    @property
    def now(self) -> dict[str, float]:
        """The latest iteration's."""
        return self.all[-1]

    def last(self, name: str, n: int, skip: int = 0) -> list[float]:
        """A metric's `n` values before the latest `skip`; empty if one is missing."""
        end = len(self.all) - skip
        window = self.all[end - n : end] if end >= n else []
        return [metrics[name] for metrics in window] if all(name in metrics for metrics in window) else []

    def deterministic(self) -> bool:
        """Whether the policy has as good as no entropy left, for 3 iterations."""
        first = max((metrics.get("entropy", 0.0) for metrics in self.all[:3]), default=0.0)
        return all_of(self.last("entropy", 3), lambda entropy: entropy < NO_ENTROPY * first)

    def risen(self) -> bool:
        """Whether the last third of the returns, at most 10, is higher than the first by over two standard errors.

        The noise is that of successive differences, which a trend hardly touches.
        """
        returns = [metrics["return_mean"] for metrics in self.all if "return_mean" in metrics]
        n = min(10, len(returns) // 3)
        if n == 0:
            return False
        steps = fmean((b - a) ** 2 for a, b in pairwise(returns)) / 2
        return fmean(returns[-n:]) - fmean(returns[:n]) > 2 * math.sqrt(2 * steps / n)


def all_of(values: list[float], test: Callable[[float], bool]) -> bool:
    """Whether there are values and all pass."""
    return bool(values) and all(map(test, values))


# -- The conditions: a sentence where one holds --------------------------------------------------------------------


def not_finite(history: History) -> str | None:
    """A metric is infinite or not a number, which no healthy one ever is."""
    names = [name for name, value in history.now.items() if not math.isfinite(value)]
    if not names:
        return None
    return (
        f"{', '.join(names)} not finite: an update has thrown the policy or the value far off; "
        "start again from an earlier checkpoint with a lower ppo.learning_rate."
    )


def choice_collapsed(history: History) -> str | None:
    """One kind of action takes more than 98 %, and fewer than one decision in two episodes differs, 3 times in a row.

    The share alone would flag a good schedule that grafts once in a long episode.
    """
    lengths = history.last("episode_length", 3)
    for kind in KINDS:
        shares = history.last(kind, 3)
        rest = [(1 - share) * length for share, length in zip(shares, lengths, strict=False)]
        if all_of(shares, lambda share: share > 0.98) and all(others < 0.5 for others in rest):
            return (
                f"the controller always chooses the same ({kind}, {shares[-1]:.1%} of its decisions): look at the "
                "shares of the actions and at the return; unless that is the best there is, as `esper sweep` with the "
                "arms static and lag would show, start again with a higher ppo.entropy or a lower ppo.learning_rate."
            )
    return None


def deterministic_early(history: History) -> str | None:
    """Entropy is below 5 % of what it was, 3 times in a row, in the first half of the training.

    Healthy ones keep 22 % through the first half, and fall to 4 % by the end.
    """
    far = history.iterations is None or len(history.all) < history.iterations / 2
    if not (far and history.deterministic()):
        return None
    return (
        f"the policy is as good as deterministic (entropy {history.now['entropy']:.3f}) and explores no more: if its "
        "return is what you hoped for, stop here; else start again with a higher ppo.entropy or a lower "
        "ppo.learning_rate."
    )


def value_blind(history: History) -> str | None:
    """Explained variance is at most 0.05 (median of 8, from the 20th on) and the return is no higher than at the start.

    A constant explains 0. Healthy values start below it too, and stay there where returns are chance; then, though, the
    return rises.
    """
    values = history.last("explained_variance", 8)
    if len(history.all) < 20 or not values or median(values) > 0.05 or history.risen():
        return None
    return (
        f"explained variance is near 0 (median {median(values):+.2f} of 8 iterations) and the return has not risen: "
        "advantages are noise; look at value_loss, and try more ppo.decisions per iteration, more ppo.epochs, or "
        "another ppo.learning_rate."
    )


def update_too_large(history: History) -> str | None:
    """KL is above 10 times its target (median of 3), or above 20 times once.

    RLlib raises its penalty from 2 times on, by half each time. Healthy ones reach 6 times (median) and 11 times
    (once); the four updates that threw a toy's return from 8 to 4 or less had 30 to 133 times.
    """
    latest = history.last("kl", 3)
    usual, now = median(latest) if latest else 0.0, history.now.get("kl", 0.0)
    kl = now if now > KL_ONCE else usual
    if not math.isfinite(kl) or kl <= KL_USUAL:
        return None
    return (
        f"updates move the policy too far (KL {kl:.3g}, target {KL_TARGET}): look at the return and at lag_mean; try a "
        "lower ppo.learning_rate or fewer ppo.epochs."
    )


def no_update(history: History) -> str | None:
    """KL is below 1/20 of its target, 5 times in a row, while there is entropy left.

    Of any 5 in a row of a healthy one, the greatest is 0.0058 at least.
    """
    if not all_of(history.last("kl", 5), lambda kl: kl < KL_TARGET / 20) or history.deterministic():
        return None
    return (
        f"updates hardly change the policy (KL {history.now['kl']:.2g} for 5 iterations, target {KL_TARGET}): look at "
        "entropy, which stays high if ppo.entropy outweighs the return; try a higher ppo.learning_rate or a lower "
        "ppo.entropy."
    )


def clipped(history: History) -> str | None:
    """Most of the batch is clipped by the update's end (median of 5 above 0.7): it goes on without those decisions.

    Healthy medians: 0.55 at most, on the toy's steepest stretch, and 0.14 on the surrogate; stable-baselines3's example
    has 0.24. KL tells of rates that are too high: with 5 to 500 times the toy's, or 40 epochs, this is 0.43 at most.
    """
    latest = history.last("clip_fraction", 5)
    if not latest or median(latest) <= 0.7:
        return None
    return (
        f"{median(latest):.0%} of the decisions are clipped: an update moves them further than ppo.clip and goes on "
        "without them; look at KL and lag_mean; try fewer ppo.epochs or a lower ppo.learning_rate."
    )


def lag_grows(history: History) -> str | None:
    """The mean lag of the last 5 is above 2 updates and 1.5 times that of the 5 before.

    The fleet may run two iterations ahead of the learner (`AHEAD`); what is older comes from slow workers.
    """
    latest, before = history.last("lag_mean", 5), history.last("lag_mean", 5, skip=5)
    if not latest or not before or fmean(latest) <= max(2.0, 1.5 * fmean(before)):
        return None
    return (
        f"decisions are learned from later and later ({fmean(latest):.1f} updates after they were made, before that "
        f"{fmean(before):.1f}): look for slow workers and long episodes; try more ppo.decisions per iteration, so that "
        "fewer updates pass in an episode."
    )


def idle(history: History) -> str | None:
    """Workers are busy less than half of the time, 3 times in a row, once they have had 2 iterations to start."""
    latest = history.last("busy", 3)
    if len(history.all) < 5 or not all_of(latest, lambda busy: busy < 0.5):
        return None
    learning, sampling = history.now.get("learn_seconds", 0.0), history.now.get("sample_seconds", 0.0)
    cause = (
        f"the learner takes {learning:.1f} s an update: give it a core of its own, or use fewer workers"
        if learning > sampling
        else "look at failures and late, and whether workers are still starting; try fewer of them to a node"
    )
    return f"workers are busy only {fmean(latest):.0%} of the time: {cause}."


def losses(history: History) -> str | None:
    """A count rises in 3 of the last 5 iterations, by more than 10 % of the episodes that ended in them.

    A node that goes away is one rise, and no reason to worry.
    """
    told = []
    for name in LOSSES:
        counts = history.last(name, 6)
        rises = [after - before for before, after in pairwise(counts)]
        ended = sum(history.last("episodes", 5))
        if sum(rise > 0 for rise in rises) >= 3 and sum(rises) > 0.1 * ended:
            told.append(f"{name} +{sum(rises):.0f}")
    if not told:
        return None
    return (
        f"the fleet keeps losing work ({', '.join(told)} in 5 iterations): look at what was said of the workers above, "
        "their memory and their disks; try fewer workers to a node, or a longer fleet.deadline."
    )


CONDITIONS: tuple[Callable[[History], str | None], ...] = (
    not_finite,
    choice_collapsed,
    deterministic_early,
    value_blind,
    update_too_large,
    no_update,
    clipped,
    lag_grows,
    idle,
    losses,
)


class Health:
    """Looks at each iteration and warns once of each condition, again only after `CALM` looks without it.

    Args:
        iterations: at which the training ends, to tell early from late; none if not known.
    """

    def __init__(self, iterations: int | None = None) -> None:
        self._history = History(iterations)
        self._held: dict[str, int] = {}  # condition → the last look at which it held

    def look(self, metrics: dict[str, float]) -> list[str]:
        """Take in an iteration's `iteration_metrics`; the warnings that are new."""
        self._history.all.append(metrics)
        look = len(self._history.all)
        new = []
        for condition in CONDITIONS:
            warning = condition(self._history)
            if warning is None:
                continue
            if look - self._held.get(condition.__name__, -CALM) > CALM:
                new.append(warning)
            self._held[condition.__name__] = look
        return new


def warnings(history: list[dict[str, float]], iterations: int | None = None) -> list[str]:
    """All warnings of a training, in the order in which they would have been said."""
    health = Health(iterations)
    return [warning for metrics in history for warning in health.look(metrics)]
