"""A trained controller against the other arms on one instance set."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esper.pipelines.controllers.best_schedule import best_fixed_schedule
from esper.pipelines.controllers.comparison import BOUND, Comparison
from esper.pipelines.controllers.evaluation import Played, Progress, Stage
from esper.platform.console import duration, say
from esper.platform.contracts import GrowthPolicy
from esper.platform.errors import UserError, unknown
from esper.policies.arms import ALIASES, ArmInputs, make_policy
from esper.policies.schedule import Entry, SchedulePolicy
from esper.policies.simic.distill import Taken, median_schedule
from esper.policies.simic.policy import SimicPolicy
from esper.workers.laws.oracle import bound

TRAINED = "ppo"  # the row of the policy itself
ANYWHERE = ("static", "random", "tamiyo", "lag")
CHOSEN = ("schedule", "openloop")
"""What is chosen on the training instances: the best fixed schedule, and the policy's own median schedule."""
ARMS = (*ANYWHERE, *CHOSEN, BOUND)


def parse_arms(names: str | None, *, on_text: bool, schedules: Collection[str] = ()) -> list[str]:
    """The arms that a comma-separated list names, or all that can be had; never the policy itself, which always plays.

    Args:
        names: the list, if there is one.
        on_text: whether GPTs are trained; bounds and chosen schedules are for loss laws only.
        schedules: arms whose schedule is given.

    Raises:
        UserError: no arm, an unknown one, or one that cannot be had.
    """
    here = [arm for arm in ARMS if not on_text or arm in ANYWHERE or arm in schedules]
    if names is None:
        return here
    arms = list(dict.fromkeys(ALIASES.get(name.strip(), name.strip()) for name in names.split(",") if name.strip()))
    if not arms:
        raise UserError(f"--arms names no arm: give one or more of {', '.join(ARMS)}.")
    for arm in arms:
        if arm not in (*ARMS, TRAINED):
            raise unknown("arm", arm, [*ARMS, TRAINED, *ALIASES])
        if arm not in (*here, TRAINED):
            mend = "give --schedule FILE, or leave it out" if arm == "schedule" else "leave it out"
            raise UserError(f"arm {arm!r} is worked out on loss laws only, not on text: {mend}.")
    return [arm for arm in arms if arm != TRAINED]


@dataclass
class Contest:
    """Plays arms, and keeps the schedules that it chose for them.

    Attributes:
        stage: where the arms are compared.
        policy: the trained controller.
        training: where schedules are chosen; None on text, where that would take days.
        schedules: arm → entries, of the arms that play a schedule; one that is given is not chosen anew.
    """

    stage: Stage
    policy: SimicPolicy
    training: Stage | None = None
    schedules: dict[str, list[Entry]] = field(default_factory=dict)

    def compare(self, arms: Sequence[str]) -> Comparison:
        """Play these arms and then the policy, telling how it goes."""
        bounds = None
        played = []
        for arm in (*arms, TRAINED):
            begun = time.perf_counter()
            if arm == BOUND:
                bounds = self._bounds()
            else:
                played.append(self.stage.play(arm, self._maker(arm)))
            say(f"  {arm}: {duration(time.perf_counter() - begun)}")
        reference = next((arm for arm in ("schedule", "static") if arm in arms), None)
        return Comparison(played, reference, bounds)

    def _maker(self, arm: str) -> Callable[[int], GrowthPolicy]:
        if arm == TRAINED:
            return lambda seed: self.policy
        if arm in ANYWHERE:
            return lambda seed: make_policy(arm, ArmInputs(seed))
        if arm not in self.schedules:
            assert self.training is not None
            say(f"  {arm}: choosing on {len(self.training.instances)} training instances")
            self.schedules[arm] = (
                best_fixed_schedule(self.training.spec, self.training.instances.values())
                if arm == "schedule"
                else median_entries(self.training.play(TRAINED, lambda seed: self.policy), self.training)
            )
        return lambda seed: SchedulePolicy(self.schedules[arm])

    def _bounds(self) -> np.ndarray:
        progress, bounds = Progress(BOUND, len(self.stage.instances)), []
        for id, instance in self.stage.instances.items():
            bounds.append(bound(self.stage.spec, instance, seed=self.stage.seed_of(id)))
            progress.tick()
        return np.array(bounds)


def median_entries(played: Played, stage: Stage) -> list[Entry]:
    """The median schedule of what was played on a stage."""
    return median_grafts(played.summaries.values(), stage.spec.budget.decisions, stage.first_sites())


def median_grafts(summaries: Iterable[dict[str, Any]], decisions: int, sites: Collection[str]) -> list[Entry]:
    """The median schedule of runs, by their summaries (`median_schedule`)."""
    episodes = [
        [Taken(graft["budget_fraction"], graft["blueprint"], graft["site"]) for graft in summary["grafts"]]
        for summary in summaries
    ]
    return median_schedule(episodes, decisions, sites)
