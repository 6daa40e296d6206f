"""RunSpec: everything that decides a run's numbers, from a preset and overrides; names are resolved by registries."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from esper.platform.clock import ClockSpec
from esper.platform.data_spec import Data, DataSpec
from esper.platform.errors import UserError, unknown
from esper.platform.frozen import Batch, BelowOne, Count, Fraction, Frozen, Layers, NotNegative, Positive, Share
from esper.platform.host_spec import Host, HostSpec
from esper.platform.ledger import Axis
from esper.platform.storage import read_json

PRESETS = Path(__file__).parent / "presets"

T = TypeVar("T", bound=tuple)


def _rising(pairs: T) -> T:
    if any(first >= following for (first, _), (following, _) in pairwise(pairs)):
        raise ValueError(f"its pairs begin with {[first for first, _ in pairs]}, which must rise.")
    return pairs


def _adds_up(gpus: float) -> float:
    """Ray takes no fraction above 1; of another one below, a part of each GPU would be left over."""
    parts = 1 / gpus if 0 < gpus < 1 else gpus
    if abs(parts - round(parts)) > (0.05 if 0 < gpus < 1 else 0):
        raise ValueError(f"{gpus:g} does not add up to whole GPUs: set a whole number, or a share such as 0.5 or 0.25.")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_adds_up)]


def _ordered(span: T) -> T:
    if span[0] > span[1]:
        raise ValueError(f"it is {list(span)}, but the lower number must be the first.")
    return span


Rates = Annotated[tuple[tuple[Count, Positive], ...], AfterValidator(_rising)]
RatePath = Annotated[tuple[tuple[float, Positive], ...], AfterValidator(_rising)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]  # low and high; equal where nothing is drawn
RangeFrom0 = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_ordered)]


class OptimizerSpec(Frozen):
    """AdamW; its rate warms up, stays stable and decays, by the fraction of the budget spent.

    The stable rate is `learning_rate · (N / rate_parameters)^(−rate_exponent)`, N the non-embedding parameters now;
    `rates` or `rate_path` replace it.
    """

    learning_rate: Positive = 3e-3  # stable rate at rate_parameters
    rate_exponent: Annotated[float, Field(ge=0, le=2)] = 0.0  # 0: the same rate at every size
    rate_parameters: Count = 100_000  # non-embedding parameters at which the rate is stated
    rate_max: Positive = 0.1  # the stable rate by that law is never above this
    rates: Rates = ()  # (non-embedding parameters, stable rate), log-log interpolated
    rate_path: RatePath = ()  # (budget fraction, stable rate), joined by lines
    warmup: BelowOne = 0.02  # fraction of the budget over which the rate rises
    decay_from: Annotated[float, Field(gt=0, le=1)] = 0.8  # fraction of the budget at which it starts to fall
    final_rate: Fraction = 0.0  # at the budget's end, relative to the stable one
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)  # decay of the means of gradients and of their squares
    eps: Positive = 1e-8  # added to the root of the latter
    weight_decay: NotNegative = 0.1  # on matrices; none on biases and norms
    grad_clip: Positive = 1.0  # largest norm of the whole gradient

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup >= self.decay_from:
            raise ValueError(f"warmup is {self.warmup}, but must be below decay_from = {self.decay_from}.")
        return self


class BudgetSpec(Frozen):
    """How much a run may use, and how often the controller decides."""

    axis: Axis = "parameter_seconds"  # what the budget counts
    amount: Positive = 1e6  # in the axis's own unit
    decisions: Annotated[int, Field(ge=1, le=1000)] = 24  # K, in an episode
    # Budget fractions at which a copy, not charged, is annealed.
    cooldowns: Annotated[tuple[Share, ...], Field(max_length=1000)] = ()


def _listed(names: Any) -> Any:
    return [name for name in names.split(",") if name] if isinstance(names, str) else names


class GrowthSpec(Frozen):
    """How far and how a host may grow."""

    max_layers: Layers = 4  # at most, those it starts with included
    max_parameters: Count | None = None  # none: no cap but max_layers
    min_optimizer_steps: Count = 10  # that a decision must hold after a graft
    probation_steps: Count = 200  # optimizer steps over which a seed's learning rate warms up
    lockout_decisions: Annotated[int, Field(ge=0)] = 4  # that a graft which was rolled back is barred from its site
    # Those that may be grafted, each with settings of its own.
    blueprints: dict[str, dict[str, Any]] = Field(default={"attention": {}, "ffn": {}, "block": {}})
    plugins: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()  # modules with blueprints of the user's own


class TrainerSpec(Frozen):
    """How steps are computed."""

    # By a compiled step (`workers/tolaria/compiled.py`) where the host has no young seeds: auto where that should save
    # more time than its build takes, on wherever possible, off never.
    compile: Literal["auto", "on", "off"] = "auto"


class RewardSpec(Frozen):
    """The PPO arm's objective, −Loss − Rent."""

    rent: NotNegative = 0.2  # nats that a reference run's parameter-seconds cost
    reference: Positive | None = None  # the reference run's; none means the budget, or what the starting size would use


class FleetSpec(Frozen):
    """Where workers run."""

    workers: Annotated[int, Field(ge=1, le=10_000)] | None = None  # so many; none means one a core (or a GPU share)
    cpus: NotNegative = 1.0  # cores of a worker
    gpus: Gpus = 0.0  # GPUs of a worker; fractions share one
    storage: str | None = None  # where workers save: a path or pyarrow URI that all nodes see; none: beside --out
    deadline: Annotated[float, Field(gt=1)] = 20.0  # times what a decision should take; then its worker is replaced
    grace: Positive = 300.0  # seconds that an order may take beside that: to start, to restore


class PPOSpec(Frozen):
    """PPO (Schulman et al. 2017, 1707.06347) in RLlib's terms; γ is 1 by design."""

    iterations: Count = 20  # of collecting decisions and learning from them
    decisions: Batch = 256  # that an iteration learns from (train_batch_size)
    minibatch: Batch = 64  # decisions of one gradient step
    epochs: Count = 6  # passes over an iteration's decisions
    learning_rate: Positive = 1e-3  # of Adam
    gae_lambda: Fraction = 0.95  # λ of the advantages; 1: what was returned, less the value
    clip: Share = 0.2  # ε: how far from 1 the ratio of probabilities is followed
    entropy: NotNegative = 0.005  # coefficient of the entropy bonus
    anchor: NotNegative = 0.3  # coefficient of the KL divergence from a clone of the planner, where there is one
    hidden: Annotated[int, Field(ge=4, le=2**12)] = 64  # width of the policy network
    learners: Annotated[int, Field(ge=0, le=1024)] = 0  # learner processes; 0 learns in the driver
    learner_gpus: Gpus = 0.0  # GPUs of a learner
    held_out: Annotated[int, Field(ge=0, le=64)] = 4  # episodes by which the best policy is chosen; 0 takes the last


class LawSpec(Frozen):
    """Ranges (low, high) of a surrogate's laws (`workers/laws/scaling_law.py`), drawn evenly; "log": in the logarithm.

    The defaults fit no text in particular; `workers/laws/fit.py` fits them to static runs.
    """

    floor: Range = (0.3, 0.3)  # E, nats
    size: Range = (1.2, 1.8)  # A, nats
    size_exponent: Range = (0.4, 0.7)  # α, of the parameters
    data: Range = (0.02, 0.4)  # B, nats; log
    data_exponent: Range = (0.6, 0.9)  # β, of the tokens
    heads: Range = (0.03, 6.0)  # weight of an attention parameter; log
    width: Range = (0.03, 6.0)  # weight of any other parameter; log
    layer: Range = (0.02, 1.0)  # weight of a layer itself, in parameters of the first; log
    depth: RangeFrom0 = (0.0, 0.0)  # λ: A falls as layers^(−λ)
    slowness: RangeFrom0 = (0.0, 0.0)  # κ: tokens count layers^(−κ)
    expert: Range = (1.0, 1.0)  # weight of an expert's parameter, in that of any other


class RunSpec(Frozen):
    """A whole run. Saved beside every result."""

    preset: str = "custom"  # name of the preset it came from
    host: Host = HostSpec()
    data: Data = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    clock: ClockSpec = ClockSpec()
    budget: BudgetSpec = BudgetSpec()
    growth: GrowthSpec = GrowthSpec()
    trainer: TrainerSpec = TrainerSpec()
    reward: RewardSpec = RewardSpec()
    fleet: FleetSpec = FleetSpec()
    ppo: PPOSpec = PPOSpec()
    laws: LawSpec = LawSpec()
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (autocast)
    threads: Annotated[int, Field(ge=1, le=1024)] = 1  # CPU threads of a run; numbers are equal only at equal threads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.growth.max_layers < self.host.n_layer:
            given = f"growth.max_layers is {self.growth.max_layers}"
            raise ValueError(f"{given}, but must be at least host.n_layer = {self.host.n_layer}.")
        if self.host.takes != self.data.kind:
            what = f"host is a {self.host.kind}, which takes {self.host.takes}, but data is {self.data.kind}"
            raise ValueError(f"{what}: take the preset of another task.")
        if (why := self.host.unfit(self.dtype, self.device)) is not None:
            raise ValueError(why)
        return self

    def overridden(self, values: Mapping[str, Any]) -> Self:
        """With values by dotted key (`budget.amount`); raises UserError for an unknown key or a value not allowed."""
        dump = self.model_dump(mode="json")
        for key, value in values.items():
            *parents, last = key.split(".")
            group = dump
            for part in parents:
                if not isinstance(group.get(part), dict):
                    group[part] = {}
                group = group[part]
            group[last] = value
        return type(self).checked(dump, "the spec")


def presets() -> tuple[str, ...]:
    """Names of the presets that ship."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.json")))


def load_spec(preset: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """A preset (name or JSON file) with `key.path=value` overrides, JSON or text; raises UserError for a wrong one."""
    path = PRESETS / f"{preset}.json" if preset in presets() else Path(preset)
    if path.suffix != ".json" and not path.exists():
        raise UserError(f"{unknown('preset', preset, presets())} A path to a JSON file is allowed too.")
    values = read_json(path, str(path), "a JSON file of a spec")
    named = {"preset": path.stem, **values} if isinstance(values, dict) else values
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override!r} is not of the form key.path=value, such as budget.decisions=12.")
        changes[key] = value_of(text)
    return RunSpec.checked(named, str(path)).overridden(changes)


def value_of(text: str) -> Any:
    """The JSON value that `text` is, or else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
