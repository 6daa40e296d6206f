"""A sweep's plan: what was asked for, and who takes part in it on which seeds.

The plan lies in the sweep's folder (`plan.json`), beside the spec and copies of what its controllers need, so a resumed
sweep asks for nothing.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from esper.pipelines.sweeps.arm_names import LRPATH, OPENLOOP, SCHEDULES
from esper.pipelines.sweeps.controller import TrainedOn
from esper.pipelines.sweeps.entrants import Entrant, parse_arms
from esper.pipelines.sweeps.grid import Point, parse_grid
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec
from esper.policies.arms import ARMS, ArmInputs, make_policy
from esper.policies.simic.policy import policy_folder

PLAN = "plan.json"
TUNING_SEEDS = 2_000_000  # tuning seeds start here, far from any test seed


@dataclass(frozen=True)
class Contestants:
    """Who takes part, and on what.

    Attributes:
        entrants: the arms.
        sizes: of static ones, in layers.
        points: of the grid.
        seeds: that are compared on.
        tuning_seeds: that everything is chosen on.
        tune_rates: whether the static sizes' rates are looked for.
        files: what the controllers need.
    """

    entrants: Sequence[Entrant]
    sizes: Sequence[int]
    points: Sequence[Point]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    tune_rates: bool
    files: ArmInputs

    @property
    def several(self) -> bool:
        """Whether there are several points."""
        return len(self.points) > 1

    def has(self, arm: str) -> bool:
        """Whether an arm takes part."""
        return any(entrant.arm == arm for entrant in self.entrants)

    def schedules(self) -> list[Entrant]:
        """The fixed schedules."""
        return [entrant for entrant in self.entrants if entrant.arm in SCHEDULES]

    def statics(self) -> list[Entrant]:
        """The static sizes, also where only something else needs to know of them."""
        return [Entrant("static", size) for size in self.sizes]


class Plan(Frozen):
    """What a sweep is, beside its spec: `plan.json`."""

    arms: str
    sizes: tuple[int, ...]
    seed: int
    seeds: int
    tuning_seeds: int
    grid: tuple[str, ...]
    tune_lr: bool
    policy: Path | None
    train_on: TrainedOn
    schedule: Path | None
    own: tuple[str, ...] = Field(description="keys that the user has set")
    task: str
    data: Path
    key: str = Field(description="of its run in MLflow")
    store: str = Field(description="MLflow's, that a resumed sweep goes on with, unless it is told of another")
    command: tuple[str, ...] = Field(description="that began it")
    commit: str = Field(description="likewise")

    def contestants(self, spec: RunSpec) -> Contestants:
        """Who takes part.

        Raises:
            UserError: an arm, size or grid is not allowed, or an arm lacks what it needs.
        """
        entrants = parse_arms(self.arms, self.sizes)
        points = parse_grid(self.grid, spec)
        tuning = [TUNING_SEEDS + self.seed + i for i in range(self.tuning_seeds)]
        seeds = [self.seed + i for i in range(self.seeds)]
        files = ArmInputs(policy=self.policy, schedule=self.schedule)
        found = Contestants(entrants, self.sizes, points, seeds, tuning, self.tune_lr, files)
        self._check(found)
        return found

    def trains(self) -> bool:
        """Whether a controller is trained first."""
        return self.policy is None and "ppo" in self._arms()

    def _arms(self) -> list[str]:
        return [entrant.arm for entrant in parse_arms(self.arms, self.sizes)]

    def _check(self, contestants: Contestants) -> None:
        """Refuse an arm that lacks what it needs."""
        for point in contestants.points:
            inputs = ArmInputs(0, self.policy, self.schedule, blueprints=tuple(point.spec.growth.blueprints))
            for entrant in contestants.entrants:
                if entrant.arm == OPENLOOP and self.policy is None and not contestants.has("ppo"):
                    raise UserError(
                        "arm 'openloop' replays what a trained policy did: give --policy CHECKPOINT, or add ppo to "
                        "--arms, which trains one first."
                    )
                controller = "ppo" if entrant.arm == OPENLOOP else entrant.arm
                if controller in ARMS and not (controller == "ppo" and self.policy is None):
                    make_policy(controller, inputs)
        plays = contestants.has("ppo") or contestants.has(OPENLOOP)
        for flag, arm, given, used in (
            ("--policy", "ppo", self.policy, plays),
            ("--schedule", "schedule", self.schedule, contestants.has("schedule")),
            ("--train-on laws", "ppo", self.train_on == "laws", self.trains()),
        ):
            if given and not used:
                raise UserError(f"{flag} is for arm {arm!r}, and no such arm would use it: leave it out, or add {arm}.")
        needs = {
            "--tune-lr": self.tune_lr,
            "arm 'openloop'": contestants.has(OPENLOOP),
            "--train-on laws": self.trains() and self.train_on == "laws",
            f"arm '{LRPATH}' with several sizes": contestants.has(LRPATH) and len(self.sizes) > 1,
        }
        for what, needed in needs.items():
            if needed and not self.tuning_seeds:
                raise UserError(f"{what} needs tuning seeds, and --tuning-seeds is 0: give at least 1.")
        if self.trains() and self.train_on == "laws" and len(self.sizes) < 3:
            raise UserError(
                f"--train-on laws fits them to static sizes, at least 3, and --sizes names {len(self.sizes)}: give "
                "more, such as --sizes 1,2,4."
            )


def with_own_inputs(plan: Plan, out: Path) -> Plan:
    """With copies, in the sweep's folder, of what controllers need: nobody changes them while it runs."""
    if plan.policy is not None:
        shutil.copytree(policy_folder(plan.policy), out / "inputs" / "policy", dirs_exist_ok=True)
        plan = plan.model_copy(update={"policy": out / "inputs" / "policy"})
    if plan.schedule is not None:
        (out / "inputs").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.schedule, out / "inputs" / "schedule.json")
        plan = plan.model_copy(update={"schedule": out / "inputs" / "schedule.json"})
    return plan
