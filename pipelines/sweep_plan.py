"""A sweep's plan: who takes part, on which seeds, at which points of a grid; and each trial that comes of it.

A trial is one arm on one seed at one grid point: a whole training run. Its label is how tables call the arm: `static-2`
is a static GPT with 2 layers, `random:tamiyo` grafts as often and the same kinds as Tamiyo did on the same seed.

    purpose   seeds    what for
    rates     tuning   finds the learning rate of each static size
    tuning    tuning   chooses the best static size and the best schedule; gives `openloop` its schedule
    test      test     is compared
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from esper.pipelines.arm_names import FINAL, FOLLOWERS, LRPATH, MADE_HERE, OPENLOOP
from esper.platform.errors import UserError, unknown
from esper.platform.spec import RunSpec, value_of
from esper.policies.arms import ALIASES, ARMS, ArmInputs
from esper.workers.tolaria.rate import rate, stable_rate

Purpose = Literal["rates", "tuning", "test"]

SWEEP_ARMS = (*ARMS, *MADE_HERE)
CHOSEN_FIRST = ("ppo", "tamiyo", "lag")  # whom a follower follows where it names nobody, if they take part

TUNING_SEEDS = 2_000_000  # tuning seeds start here, far from any test seed
COOLDOWNS = (0.3, 0.6)  # budget fractions of the annealed losses that opponents need on other axes than the budget's


@dataclass(frozen=True)
class Entrant:
    """A row of the comparison.

    Attributes:
        arm: its kind.
        size: layers of a static one.
        of: label of the arm that it follows.
    """

    arm: str
    size: int | None = None
    of: str | None = None

    @property
    def label(self) -> str:
        """How tables call it."""
        if self.arm == "static":
            return f"static-{self.size}"
        return self.arm if self.of is None else f"{self.arm}:{self.of}"

    @property
    def follows(self) -> bool:
        """Whether its runs need another arm's runs first."""
        return self.of is not None


@dataclass(frozen=True)
class Point:
    """A grid point.

    Attributes:
        index: its number.
        values: by dotted key.
        spec: with the values put in.
    """

    index: int
    values: dict[str, Any]
    spec: RunSpec

    @property
    def grid(self) -> str:
        """As MLflow's tag has it."""
        return json.dumps(self.values, sort_keys=True)


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        entrant: the arm.
        purpose: what for.
        seed: of the run.
        point: where.
        spec: everything that decides its numbers.
        inputs: files that its gardener needs.
        note: tells it from others of the same label and seed.
        several: whether there are several points.
    """

    entrant: Entrant
    purpose: Purpose
    seed: int
    point: Point
    spec: RunSpec
    inputs: ArmInputs
    note: str = ""
    several: bool = False

    @property
    def name(self) -> str:
        """Its own among the sweep's: a folder's and a run's."""
        return trial_name(self.entrant, self.seed, self.point, self.note, several=self.several)

    @property
    def row(self) -> str:
        """Of a table of all grid points."""
        return f"{self.entrant.label} {self.point.grid}" if self.several else self.entrant.label

    @property
    def arm(self) -> str:
        """The gardener that plays it."""
        arm = self.entrant.arm
        return {FINAL: "static", LRPATH: "static", OPENLOOP: "schedule"}.get(arm, arm)

    def tags(self) -> dict[str, Any]:
        """What MLflow's UI filters and groups by."""
        return {
            "kind": "trial",
            "arm": self.entrant.arm,
            "label": self.entrant.label,
            "size": self.spec.host.n_layer,
            "seed": self.seed,
            "purpose": self.purpose,
            "grid": self.point.grid,
            "preset": self.spec.preset,
        }


def trial_name(entrant: Entrant, seed: int, point: Point, note: str = "", *, several: bool) -> str:
    """A trial's own among its sweep's."""
    parts = [entrant.label.replace(":", ".of."), note, f"seed{seed}"]
    parts += [f"point{point.index}"] if several else []
    return "-".join(part for part in parts if part)


def parse_arms(text: str, sizes: Sequence[int]) -> list[Entrant]:
    """The entrants that `--arms` names, static ones first, followers last.

    Raises:
        UserError: no arm, an unknown one, or one that follows nobody who takes part.
    """
    named: dict[str, str] = {}  # arm, and whom it follows, as they were typed
    for part in filter(None, (part.strip() for part in text.split(","))):
        arm, _, of = part.partition(":")
        arm = ALIASES.get(arm, arm)
        if arm not in SWEEP_ARMS:
            raise unknown("arm", arm, [*SWEEP_ARMS, *ALIASES])
        if of and arm not in FOLLOWERS:
            raise UserError(
                f"arm {part!r}: {arm} follows no other arm; of those that do there are {', '.join(FOLLOWERS)}."
            )
        named[f"{arm}:{ALIASES.get(of, of)}" if of else arm] = arm
    if not named:
        raise UserError(f"--arms names no arm: give one or more of {', '.join([*SWEEP_ARMS, *ALIASES])}.")
    growing = [arm for arm in named.values() if arm not in ("static", *FOLLOWERS)]
    first = next((arm for arm in (*CHOSEN_FIRST, *growing) if arm in growing), None)
    static = [Entrant("static", size) for size in sizes] if "static" in named else []
    followers = [
        _follower(arm, typed.partition(":")[2], first, growing) for typed, arm in named.items() if arm in FOLLOWERS
    ]
    alone = [Entrant(arm) for arm in dict.fromkeys(growing)]
    return list(dict.fromkeys([*static, *alone, *followers]))


def _follower(arm: str, of: str, first: str | None, growing: Sequence[str]) -> Entrant:
    if of and of not in growing:
        raise UserError(
            f"arm '{arm}:{of}' follows {of}, which does not take part or does not grow: add it to --arms, or name one "
            f"that does ({', '.join(growing) or 'there is none'})."
        )
    if not of and first is None and arm != "random":
        raise UserError(f"arm {arm!r} follows an arm that grows, and --arms names none: add one, such as tamiyo.")
    return Entrant(arm, of=of or first)


def parse_sizes(text: str | None, spec: RunSpec) -> list[int]:
    """The static sizes that `--sizes` names, smallest first; the preset's own for None.

    Raises:
        UserError: one is no number of layers.
    """
    if text is None:
        return [spec.host.n_layer]
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    if not sizes or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--sizes {text!r} is not a list of layers: write it as 1,2,4.")
    return sorted({int(size) for size in sizes})


def parse_grid(grids: Sequence[str], spec: RunSpec) -> list[Point]:
    """The points of the grid that `--grid key=a,b,c` spans, given once per key; one point without any.

    Raises:
        UserError: no `key=values`, a key twice, an unknown key, a value that is not allowed, or another text.
    """
    points: list[dict[str, Any]] = [{}]
    for grid in grids:
        key, equals, text = grid.partition("=")
        values = _grid_values(text)
        if not equals or not key or not values:
            raise UserError(f"--grid {grid!r} is not of the form key.path=a,b,c, such as budget.amount=1e6,3e6.")
        if any(key in point for point in points):
            raise UserError(f"--grid names {key} twice: give all its values at once.")
        if key.startswith("data.") and key.split(".")[1] not in ("batch_size", "eval_tokens"):
            raise UserError(f"--grid {key} would change the text: a sweep compares on one; run a sweep for each.")
        if key.split(".")[0] in ("preset", "fleet"):
            raise UserError(f"--grid {key} changes no number of a run: give it once, with --set {key}=….")
        unlike = {json.dumps(value, sort_keys=True): value for value in values}.values()
        points = [{**point, key: value} for point in points for value in unlike]
    return [Point(index, values, spec.overridden(values)) for index, values in enumerate(points)]


def _grid_values(text: str) -> list[Any]:
    """Values between commas, those of JSON lists and objects left whole."""
    try:
        return list(json.loads(f"[{text}]"))
    except ValueError:
        return [value_of(part.strip()) for part in text.split(",") if part.strip()]


def static_spec(spec: RunSpec, size: int, constant: float | None = None) -> RunSpec:
    """With so many layers from the start, and a stable rate that is the same at every size, where one is given."""
    values: dict[str, Any] = {"host.n_layer": size, "host.layers": None}
    if constant is not None:
        values["optimizer.learning_rate"] = constant
        values["optimizer.rate_exponent"] = 0.0
        values["optimizer.rate_max"] = max(constant, spec.optimizer.rate_max)
    return _born(spec, values)


def final_spec(spec: RunSpec, shape: Sequence[dict[str, Any]]) -> RunSpec:
    """Born in a shape that a run ended with (its summary's `shape`)."""
    return _born(spec, {"host.n_layer": len(shape), "host.layers": list(shape)})


def lrpath_spec(spec: RunSpec, size: int, curve: Iterable[dict[str, float]]) -> RunSpec:
    """A static size under the stable rate that a run had (its summary's `val_curve`), read at its decisions."""
    path = []
    for point in curve:
        fraction = point["budget_fraction"]
        share = rate(spec.optimizer, fraction, 1) / stable_rate(spec.optimizer, 1)  # that warm-up and decay leave
        if share > 0 and fraction >= spec.optimizer.warmup:
            path.append([fraction, point["learning_rate"] / share])
    return _born(spec, {"host.n_layer": size, "host.layers": None, "optimizer.rate_path": path})


def with_cooldowns(spec: RunSpec) -> RunSpec:
    """With annealed losses on the way, unless the spec has its own."""
    return spec if spec.budget.cooldowns else spec.overridden({"budget.cooldowns": COOLDOWNS})


def _born(spec: RunSpec, values: dict[str, Any]) -> RunSpec:
    """A shape that is started with may be larger than growing may get."""
    layers = max(values["host.n_layer"], spec.growth.max_layers)
    return spec.overridden({**values, "growth.max_layers": layers})
