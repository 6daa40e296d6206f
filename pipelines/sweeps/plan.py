"""A sweep's plan: arms, seeds and grid points, as the command line asks for them; its trials. Imports no torch."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from esper.pipelines.common.arguments import ResumableArguments, flag
from esper.pipelines.sweeps.arms import FOLLOWERS, LRPATH, NAMES, OPENLOOP, PPO, STATIC, Arm, parse_arms
from esper.pipelines.sweeps.sizes import Size, parse_sizes
from esper.platform.console import counted
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec, value_of
from esper.policies.arms import ArmInputs, make_policy

TUNING_SEEDS = 2_000_000  # tuning seeds start here, far from any test seed
AMOUNT = "budget.amount"  # the key of a grid of budgets
AT_ONCE = 5  # test seeds that a sweep begins with and adds, where it adds some: as many as a verdict takes
WIDTH = 0.02  # nats
MOST_SEEDS = 1000
PREPARED = {"kind", "source", "tokenizer", "valid_fraction", "max_bytes", "size", "max_images"}  # keys of `data`
LAW_SIZES = 3  # static sizes, at least, that loss laws can be fitted to
Purpose = Literal["rates", "tuning", "test"]  # of a trial
TrainedOn = Literal["text", "laws"]  # a controller: on GPTs, or on loss laws fitted to the sweep's static runs


class SweepArguments(ResumableArguments):
    """Compare arms at an equal budget."""

    arms: str = flag(
        "static,tamiyo",
        f"Arms, of {', '.join(NAMES)}. {', '.join(FOLLOWERS)} follow another arm: static_final:tamiyo.",
        "A,B,C",
    )
    sizes: str | None = flag(None, "Static sizes, layers x width (default: the preset's); auto: found.", "1,2x96|auto")
    seeds: str = flag(
        "1",
        "Test seeds of each arm, --seed and those after it; auto:N adds some up to N until --width is met.",
        "N|auto:N",
    )
    width: float | None = flag(None, f"With --seeds auto:N: a regret's widest interval, nats (default: {WIDTH}).", gt=0)
    tuning_seeds: int = flag(2, "Other seeds, that sizes, schedules and rates are chosen on.", ge=0, le=100)
    budgets: str | None = flag(None, "Compare at each of these budgets, and over all of them.", "0.5e6,1e6,…")
    grid: tuple[str, ...] = flag((), "Compare at each of these values; may be given for several keys.", "KEY=A,B")
    tune_lr: bool = flag(False, "Find each arm's learning rate and where it starts to fall, on tuning seeds.")
    policy: tuple[str, ...] = flag(
        (),
        "For ppo: a trained policy; without one it is trained first. For arm ppo:NAME: NAME=PATH; may be given again.",
        "[NAME=]PATH",
    )
    train_on: TrainedOn = flag("text", "What ppo without --policy learns on: text, or loss laws fitted to static runs.")
    schedule: Path | None = flag(None, "For schedule: a JSON list of grafts.", "FILE")
    laws: Path | None = flag(None, "For planner: loss laws that `esper policy fit` fitted.", "FILE")


@dataclass(frozen=True)
class Point:
    """A grid point."""

    index: int
    values: dict[str, Any]  # by dotted key
    spec: RunSpec  # with these values
    several: bool = False  # the grid has other points
    trains: int = 0  # index of the first point that is equal but for the budget: there their controller is trained

    @property
    def grid(self) -> str:
        return json.dumps(self.values, sort_keys=True)

    def row(self, arm: Arm) -> str:
        return f"{arm.label} {self.grid}" if self.several else arm.label

    def __str__(self) -> str:
        told = (f"{key} = {value:,}" if key == AMOUNT else f"{key} = {value}" for key, value in self.values.items())
        return f"{', '.join(told)}: " if self.values else ""


@dataclass(frozen=True, eq=False)
class Trial:
    """One arm on one seed at one grid point, a whole training run.

    Purposes: "rates" and "tuning" run on tuning seeds, and choose each arm's learning rate and decay, then the best
    size and schedule. "test" runs on test seeds, and is compared.
    """

    arm: Arm
    purpose: Purpose
    seed: int
    point: Point
    spec: RunSpec
    inputs: ArmInputs = field(default_factory=ArmInputs)  # files that its policy needs
    note: str = ""  # tells it from others of the same label and seed
    impossible: str | None = None  # why it cannot be run, if it cannot

    @property
    def name(self) -> str:
        """Unique in the sweep; names its folder and its run."""
        parts = [self.arm.label.replace(":", ".of." if self.arm.of else "."), self.note, f"seed{self.seed}"]
        return "-".join(filter(None, [*parts, f"point{self.point.index}" if self.point.several else ""]))

    def tags(self) -> dict[str, Any]:
        whose = {"arm": self.arm.name, "label": self.arm.label, "size": self.spec.host.n_layer, "seed": self.seed}
        return {**whose, "purpose": self.purpose, "grid": self.point.grid}


class SweepPlan(Frozen):
    """What a sweep is, beside its spec; a resumed sweep reads it from its folder."""

    arms: tuple[Arm, ...]
    sizes: tuple[Size, ...]  # static ones, smallest first, also where only something else needs to know of them
    search_sizes: bool  # they are found at each grid point, from the one in `sizes` on
    seeds: tuple[int, ...]  # that arms are compared on, at most
    width: float | None  # nats: if set, seeds are added until intervals are as narrow
    tuning_seeds: tuple[int, ...]  # that everything is chosen on
    grid: tuple[dict[str, Any], ...]  # each point's values by dotted key
    tune_lr: bool
    train_on: TrainedOn
    own: tuple[str, ...]  # keys that the user has set
    command: tuple[str, ...]

    @classmethod
    def settled(cls, arguments: SweepArguments, spec: RunSpec) -> "SweepPlan":
        """Read the command line. Raises UserError where an arm, size or grid is not allowed or lacks what it needs."""
        seed, tuning = arguments.seed, TUNING_SEEDS + arguments.seed
        search, own = arguments.sizes == "auto", Size(layers=spec.host.n_layer)
        sizes = [own] if arguments.sizes is None or search else parse_sizes(arguments.sizes)
        sizes.sort(key=lambda size: size.parameters(spec))
        seeds, adds = parse_seeds(arguments.seeds)
        plan = cls(
            arms=tuple(parse_arms(arguments.arms, sizes)),
            sizes=tuple(sizes),
            search_sizes=search,
            seeds=tuple(range(seed, seed + seeds)),
            width=(arguments.width or WIDTH) if adds else None,
            tuning_seeds=tuple(range(tuning, tuning + arguments.tuning_seeds)),
            grid=tuple(parse_grid(arguments.grid, arguments.budgets)),
            tune_lr=arguments.tune_lr,
            train_on=arguments.train_on,
            own=tuple(override.partition("=")[0] for override in arguments.set),
            command=tuple(sys.argv),
        )
        plan._check(arguments, spec)
        return plan

    @property
    def compared(self) -> list[Arm]:
        """The arms whose intervals have to be narrow where seeds are added."""
        return [arm for arm in self.arms if arm.kind.grows and arm.of is None]

    def points(self, spec: RunSpec) -> list[Point]:
        rests = [{key: value for key, value in values.items() if key != AMOUNT} for values in self.grid]
        several, numbered = len(self.grid) > 1, enumerate(self.grid)
        return [Point(i, each, spec.overridden(each), several, rests.index(rests[i])) for i, each in numbered]

    def _check(self, given: SweepArguments, spec: RunSpec) -> None:
        policies = parse_policies(given.policy)
        files: dict[str, Any] = {"policy": policies.get(""), "schedule": given.schedule, "laws": given.laws}
        own = {arm.policy for arm in self.arms if arm.name == PPO}
        for name in sorted((policies.keys() ^ own) - {""}):
            raise UserError(
                f"arm 'ppo:{name}' needs its policy: give --policy {name}=PATH."
                if name in own
                else f"--policy {name}=… is of arm 'ppo:{name}', which --arms lacks: add it, or leave the policy out."
            )
        arms = [arm for arm in self.arms if not arm.policy]
        if spec.host.layers and STATIC in {arm.name for arm in arms}:
            raise UserError("host.layers is one network's shape, and static arms have sizes: leave it out.")
        names, needs, policy = {arm.name for arm in arms}, {arm.kind.needs for arm in arms}, policies.get("")
        laws, trains = self.train_on == "laws", policy is None and PPO in names
        unused = {name: path and name not in needs for name, path in files.items()}
        untuned = {"--tune-lr": self.tune_lr, "--train-on laws": laws, f"arm {OPENLOOP!r}": OPENLOOP in names}
        untuned[f"arm {LRPATH!r} with several sizes"] = LRPATH in names and len(self.sizes) > 1
        untuned |= {"--sizes auto": self.search_sizes, "--seeds auto:N": self.width is not None and len(self.sizes) > 1}
        for flag_name, wrong in {**unused, "train-on laws": laws and not trains}.items():
            if wrong:
                raise UserError(f"no arm of --arms uses --{flag_name}: leave it out, or add an arm that does.")
        if given.width is not None and self.width is None:
            raise UserError("--width is for --seeds auto:N, to add enough: give that too, such as --seeds auto:40.")
        if self.width is not None and not (names & {STATIC} and self.compared):
            raise UserError("--seeds auto:N compares arms that grow with static sizes: name some of both in --arms.")
        for what, wanted in untuned.items():
            if wanted and not self.tuning_seeds:
                raise UserError(f"{what} needs tuning seeds, and --tuning-seeds is 0: give at least 1.")
        if "policy" in needs and not policy and not trains:
            raise UserError(f"arm {OPENLOOP!r} replays a trained policy: give --policy CHECKPOINT, or add arm ppo.")
        if laws and len(self.sizes) < LAW_SIZES and not self.search_sizes:
            raise UserError(f"--train-on laws needs {LAW_SIZES} static sizes: give more, such as --sizes 1,2,4.")
        for point in self.points(spec):
            check_budget(point.spec)
            inputs = ArmInputs(spec=point.spec, **files)
            for arm in self.arms:
                if arm.kind.needs != "policy":
                    make_policy(arm.kind.plays, inputs)
        for path in policies.values():
            make_policy(PPO, ArmInputs(policy=path))


def check_budget(spec: RunSpec) -> None:
    """Raise UserError where a budget holds less than one optimizer step per decision, if a clock can tell."""
    from esper.workers.observe import batch_tokens  # torch: seconds that `esper sweep --help` does not take
    from esper.workers.tolaria.hosts import start_shape

    axis, amount = spec.budget.axis, spec.budget.amount
    # At least: a text has a larger vocabulary.
    step = spec.clock.axis_per_step(axis, start_shape(spec, vocab_size=1), batch_tokens(spec))
    if spec.clock.foretells(axis) and amount < step * spec.budget.decisions:
        what = f"a budget of {amount:,.6g} {axis} in {counted(spec.budget.decisions, 'decision')}"
        raise UserError(f"{what} holds less than one optimizer step in each: give a larger one, or fewer decisions.")


def parse_seeds(text: str) -> tuple[int, bool]:
    """The number of test seeds that `--seeds` names, at most, and whether they are added as they are needed."""
    found = re.fullmatch(r"(auto:)?0*(\d{1,4})", text.strip())
    count, adds = (int(found[2]), bool(found[1])) if found else (0, False)
    if not (AT_ONCE if adds else 1) <= count <= MOST_SEEDS:
        told = f"give 1 to {MOST_SEEDS:,}, or auto:N with the most that may be spent, {AT_ONCE} or more, as in auto:40"
        raise UserError(f"--seeds {text!r} is no number of test seeds: {told}.")
    return count, adds


def parse_policies(given: Sequence[str]) -> dict[str, Path]:
    """The policies that `--policy` names, by name; the one without a name has an empty one."""
    found = {}
    for text in given:
        name, _, path = text.partition("=") if re.match(r"[\w-]+=", text) else ("", "", text)
        if name in found:
            raise UserError(f"--policy {text}: arm 'ppo{name and ':' + name}' has one already: give each one only.")
        found[name] = Path(path)
    return found


def parse_budgets(text: str) -> list[float]:
    """The budgets that `--budgets` names, from the smallest on."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = [math.nan]
    if not all(0 < budget < math.inf for budget in found):
        raise UserError(f"--budgets {text!r} is not a list of positive numbers: write it as 0.5e6,1e6,2e6.")
    return [int(budget) if budget.is_integer() else budget for budget in found]


def parse_grid(grids: Sequence[str], budgets: str | None = None) -> list[dict[str, Any]]:
    """The points that `--grid key=a,b,c`, given once per key, and `--budgets` span; one without values for none."""
    points: list[dict[str, Any]] = [{AMOUNT: budget} for budget in parse_budgets(budgets)] if budgets else [{}]
    for grid in grids:
        key, _, text = grid.partition("=")
        try:
            values = list(json.loads(f"[{text}]"))
        except (ValueError, RecursionError):
            values = [value_of(part.strip()) for part in text.split(",") if part.strip()]
        if not key or not values:
            raise UserError(f"--grid {grid!r} is not of the form key.path=a,b,c, such as host.n_embd=32,64.")
        if key == AMOUNT:
            raise UserError(f"--grid {grid} is told by --budgets: give --budgets {text}.")
        if key in points[0]:
            raise UserError(f"--grid names {key} twice: give all its values at once.")
        if key in {f"data.{name}" for name in PREPARED}:
            raise UserError(f"--grid {key} would change the data: a sweep compares on one; run a sweep for each.")
        if key.split(".")[0] in ("preset", "fleet"):
            raise UserError(f"--grid {key} changes no number of a run: give it once, with --set {key}=….")
        unlike = {json.dumps(value, sort_keys=True): value for value in values}.values()
        points = [{**point, key: value} for point in points for value in unlike]
    return points
