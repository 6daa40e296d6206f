"""A clone of the planner, taught on surrogates of fitted laws: what a controller's training may begin with.

Surrogates follow the ensemble's laws. The planner labels their decisions. It plays the first lesson, and the clone so
far the others, so that the clone knows the states its own mistakes lead to (DAgger, Ross et al. 2011, 1011.0686).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from esper.pipelines.controllers.evaluation import Evaluation
from esper.platform.console import say
from esper.platform.contracts import GraftAction, Instance
from esper.platform.law_file import FittedLaws
from esper.platform.seeding import derive, stream
from esper.platform.spaces import observation
from esper.platform.spec import RunSpec
from esper.policies.planner import PlannerPolicy
from esper.policies.simic.baseline import Baseline
from esper.policies.simic.clone import agreement, choice, teach, untaught
from esper.policies.simic.episode import Played
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import SimicPolicy
from esper.workers.instances import instance_set
from esper.workers.laws.surrogate import SurrogateRun

LESSONS, EPISODES = 3, 32  # lessons, and episodes of each
HELD_OUT, EVERY = 12, 8  # episodes by which a clone is judged, on every eighth law of the ensemble


class Cloned(NamedTuple):
    """What comes of lessons."""

    policy: SimicPolicy
    baseline: Baseline  # of the lessons' returns
    told: dict[str, float]  # how it does beside the planner, in nats, on laws that no lesson showed


@dataclass(frozen=True)
class Lessons:
    """Lessons by the planner on fitted laws; `check` is called at every decision, and may raise."""

    spec: RunSpec
    laws: FittedLaws  # that the planner plans with
    seed: int
    text: bool  # whether instances are those of text
    check: Callable[[], None]

    def clone(self) -> Cloned:
        say(f"clone   the planner by {LESSONS} lessons of {EPISODES} surrogate episodes")
        torch.set_num_threads(1)  # fixes the rounding
        taught, unseen = parted(self.laws)
        net, baseline, episodes = untaught(self.spec.ppo.hidden, self.seed), Baseline(), []
        for lesson in range(LESSONS):
            numbers = range(lesson * EPISODES, (lesson + 1) * EPISODES)
            new = [self._played(taught, "train", number, net if lesson else None) for number in numbers]
            episodes += new
            baseline.update(new)
            teach(net, episodes, baseline, derive(self.seed, "lesson", lesson), self.check)
        told = self._judged(net, unseen)
        say(
            f"        it agrees in {told['agreement']:.0%} of its decisions on laws held out, and ends at "
            f"{told['clone_loss']:.4f} there, the planner at {told['planner_loss']:.4f}"
        )
        return Cloned(SimicPolicy(net), baseline, told)

    def _judged(self, net: ControllerNet, laws: FittedLaws) -> dict[str, float]:
        labelled = [self._played(laws, "tuning", number, net) for number in range(HELD_OUT)]
        instances = {number: self._instance("tuning", number) for number in range(HELD_OUT)}
        here = Evaluation(self.spec, instances, partial(SurrogateRun, self.spec, laws), self.seed)
        told = {"agreement": agreement(net, labelled)}
        for arm, policy in (("clone", SimicPolicy(net)), ("planner", PlannerPolicy(self.laws))):
            self.check()
            told[f"{arm}_loss"] = fmean(run["val_loss"] for run in here.play(arm, lambda seed, policy=policy: policy))
        return told

    def _instance(self, name: str, number: int) -> Instance:
        instances = list(instance_set(name, self.spec, text=self.text).values())
        return instances[number % len(instances)].model_copy(update={"law": number})

    def _played(self, laws: FittedLaws, name: str, number: int, net: ControllerNet | None) -> Played:
        """An episode that the planner labels, and that it plays, or a network."""
        run, seed = SurrogateRun(self.spec, laws), derive(self.seed, name, number)
        telemetry, random = run.reset(self._instance(name, number), seed), stream(seed, "played")
        seen, labels, actions, rewards = [observation(telemetry)], [], [], []
        while not run.ended:
            self.check()
            foretold = run.forecast(self.laws) if telemetry.mask.sum() > 1 else np.zeros(1)
            labels.append(choice(foretold, run.space.candidates))
            logits = torch.from_numpy(labels[-1])
            if net is not None:
                with torch.no_grad():
                    logits = net.logits({key: torch.from_numpy(array)[None] for key, array in seen[-1].items()})[0]
            # A prune, which the planner cannot foretell, leads where it could say nothing.
            chances = logits[: len(foretold)][np.isfinite(foretold)].double().softmax(dim=-1).numpy()
            actions.append(int(random.choice(np.flatnonzero(np.isfinite(foretold)), p=chances)))
            outcome = run.step(GraftAction(actions[-1], telemetry.sequence))
            telemetry = outcome.telemetry
            seen.append(observation(telemetry))
            rewards.append(outcome.reward)
        unused = np.zeros(len(actions), np.float32)
        return Played(
            number=number,
            instance=None,
            observations={key: np.stack([each[key] for each in seen]) for key in seen[0]},
            actions=np.array(actions),
            logits=np.array(labels),
            **dict.fromkeys(("log_p", "values", "weights", "worked", "waited"), unused),
            rewards=np.array(rewards),
            terminated=True,
        )


def parted(laws: FittedLaws) -> tuple[FittedLaws, FittedLaws]:
    """The ensemble without every `EVERY`th member, and these alone; of too few, both are all."""
    every = laws.ensemble.items()
    unseen = {name: values[EVERY - 1 :: EVERY] for name, values in every}
    taught = {name: tuple(value for i, value in enumerate(values, 1) if i % EVERY) for name, values in every}
    if not all(unseen.values()):
        return laws, laws
    return laws.model_copy(update={"ensemble": taught}), laws.model_copy(update={"ensemble": unseen})
