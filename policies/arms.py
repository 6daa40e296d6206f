"""Every controller by name; the command line, the sweep and the docs derive from this list."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from esper.platform.contracts import GrowthPolicy
from esper.platform.errors import UserError, unknown
from esper.platform.law_file import FIT, FittedLaws
from esper.platform.plugins import ARMS as PLUGINS
from esper.platform.plugins import announced, arm_target
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json
from esper.policies.lag import LagPolicy
from esper.policies.planner import PlannerPolicy
from esper.policies.schedule import NAMED, SchedulePolicy, named_schedule
from esper.policies.static import StaticPolicy
from esper.policies.tamiyo import TamiyoPolicy

NEEDS = {  # arm → the file that it cannot do without (a field of ArmInputs), and what that is
    "ppo": ("policy", "a trained policy: give --policy CHECKPOINT, made by `esper ppo`"),
    "schedule": ("schedule", "a schedule: give --schedule FILE, a JSON list of budget fractions"),
    "planner": ("laws", f"fitted laws: give --laws FILE, made by `{FIT}`"),
}


@dataclass(frozen=True)
class ArmInputs:
    """What an arm may be given."""

    seed: int = 0  # the run's
    policy: Path | None = None  # a trained policy, for `ppo`
    schedule: Path | None = None  # a JSON file, for `schedule`; those of `NAMED` are arms of their own
    match: Path | None = None  # `summary.json` of a run whose grafts `random` should match in number and kind
    laws: Path | None = None  # fitted loss laws, for `planner`
    spec: RunSpec | None = None  # the run's: a schedule or a match may name its blueprints only, laws are of its preset

    def of(self, arm: str) -> Path:
        """The file that an arm needs; a UserError where it is not given."""
        name, what = NEEDS[arm]
        if (path := getattr(self, name)) is None:
            raise UserError(f"arm {arm!r} needs {what}.")
        return path

    def check(self, what: str, wanted: Iterable[str]) -> None:
        for name in wanted:
            if self.spec is not None and name not in self.spec.growth.blueprints:
                raise unknown(f"blueprint in {what}", name, self.spec.growth.blueprints)


def _ppo(inputs: ArmInputs) -> GrowthPolicy:
    from esper.policies.simic.policy import SimicPolicy

    return SimicPolicy.load(inputs.of("ppo"))


def _schedule(inputs: ArmInputs) -> GrowthPolicy:
    policy = SchedulePolicy.load(inputs.of("schedule"))
    inputs.check(f"--schedule {inputs.schedule}", (entry.blueprint for entry in policy.entries))
    return policy


def _planner(inputs: ArmInputs) -> GrowthPolicy:
    laws = FittedLaws.read(inputs.of("planner"))
    if inputs.spec is not None:
        laws.check(inputs.spec)
    return PlannerPolicy(laws)


def _tamiyo(inputs: ArmInputs) -> GrowthPolicy:
    return TamiyoPolicy() if inputs.spec is None else TamiyoPolicy(warm_up=inputs.spec.growth.probation_steps)


def _named(name: str, inputs: ArmInputs) -> GrowthPolicy:
    entries = named_schedule(name, "transformer" if inputs.spec is None else inputs.spec.host.kind)
    inputs.check(f"arm {name!r}", (entry.blueprint for entry in entries))
    return SchedulePolicy(entries)


def _random(inputs: ArmInputs) -> GrowthPolicy:
    from esper.policies.random import RandomPolicy  # imports torch: seconds that `esper train --help` does not take

    if inputs.match is None:
        return RandomPolicy(inputs.seed)
    summary = read_json(inputs.match, f"--match {inputs.match}", "a summary.json that `esper train` left")
    try:
        matched = [graft["blueprint"] for graft in summary["grafts"]]
    except (KeyError, TypeError):
        what = f"--match {inputs.match} is not the summary of a run"
        raise UserError(f"{what}: name one that `esper train` left.") from None
    inputs.check(f"--match {inputs.match}", matched)
    return RandomPolicy(inputs.seed, matched=matched)


ARMS: dict[str, Callable[[ArmInputs], GrowthPolicy]] = {
    "static": lambda inputs: StaticPolicy(),
    "random": _random,
    "schedule": _schedule,
    **{name: partial(_named, name) for name in NAMED},
    "tamiyo": _tamiyo,
    "lag": lambda inputs: LagPolicy(),
    "planner": _planner,
    "ppo": _ppo,
}
ALIASES = {"baseline": "static", "heuristic": "tamiyo"}


def arm_name(name: str) -> str:
    """The arm of a name, an alias or a plug-in; a UserError where there is none."""
    name = ALIASES.get(name, name)
    if name not in ARMS and arm_target(name) is None:
        raise unknown("arm", name, [*ARMS, *ALIASES, *announced(PLUGINS), "module:object"])
    return name


def make_policy(arm: str, inputs: ArmInputs) -> GrowthPolicy:
    """The controller of an arm; a UserError where the arm is unknown or lacks an input."""
    name = arm_name(arm)
    if name in ARMS:
        return ARMS[name](inputs)
    from esper.policies.own import own_policy

    return own_policy(arm_target(name) or "", inputs)
