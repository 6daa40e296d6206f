"""RunSpec: everything that decides a run's numbers, from a preset and overrides.

Sizes that memory depends on are bounded. Names (blueprint, host, tokenizer) are resolved by their registries.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from esper.platform.clock import ClockSpec
from esper.platform.errors import UserError, unknown
from esper.platform.frozen import Frozen
from esper.platform.ledger import Axis
from esper.platform.storage import read_json

PRESETS = Path(__file__).parent / "presets"

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[int, Field(ge=1, le=512)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Neurons = Annotated[int, Field(ge=1, le=2**20)]
Batch = Annotated[int, Field(ge=8, le=2**20)]
Range = tuple[float, float]  # low and high; equal for a number that is not drawn


class ExpertSpec(Frozen):
    """An expert that a host is born with."""

    uid: Annotated[int, Field(ge=0)]
    width: Neurons
    share: Annotated[float, Field(gt=0, le=1)]  # of the tokens that its gate is balanced to


class LayerSpec(Frozen):
    """A layer that a host is born with."""

    uid: Annotated[int, Field(ge=0)]  # names its sites: h<uid>.attention, …
    heads: Heads
    width: Neurons  # of the MLP
    experts: Annotated[tuple[ExpertSpec, ...], Field(max_length=256)] = ()


class HostSpec(Frozen):
    """The shape a host starts with."""

    kind: Literal["transformer"] = "transformer"
    n_layer: Layers = 2
    n_head: Heads = 4  # attention heads of a layer
    n_embd: Annotated[int, Field(ge=1, le=2**16)] = 64  # embedding dimension C
    block_size: Annotated[int, Field(ge=2, le=2**17)] = 64  # context length T, in tokens
    head_dim: Annotated[int, Field(ge=1, le=2**12)] | None = None  # dimension D of a head; none means n_embd / n_head
    mlp_width: Neurons | None = None  # of an MLP; none means 4 n_embd
    layers: Annotated[tuple[LayerSpec, ...], Field(max_length=512)] | None = None  # as in a summary's `shape`; or alike
    tied: bool = True  # the output head is the token embedding
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    attention: Literal["sdpa", "flash"] = "sdpa"  # torch's own, or flash-attn's: CUDA, bfloat16, the extra flash-attn

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide: "
                "change one of them, or set head_dim."
            )
        if self.layers is not None and len(self.layers) != self.n_layer:
            raise ValueError(f"n_layer is {self.n_layer}, but must be the number of layers given, {len(self.layers)}.")
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.attention == "flash" and head_dim > 256:
            raise ValueError(
                f"host.attention is 'flash', which takes heads of at most 256 dimensions, not {head_dim}: "
                "set host.head_dim, or host.attention=sdpa."
            )
        return self

    def starting_with(self, n_layer: int | None) -> Self:
        """With `n_layer` layers of equal shape; unchanged for None."""
        return self if n_layer is None else self.model_copy(update={"n_layer": n_layer, "layers": None})


class DataSpec(Frozen):
    """Text and batches."""

    source: str = "tinystories"  # a source name, a text file, a folder of them, or prepared shards
    tokenizer: str = "char"  # char, bpe:N or gpt2
    batch_size: Annotated[int, Field(ge=1, le=2**14)] = 16  # sequences in a batch
    eval_tokens: Annotated[int, Field(ge=64, le=2**26)] = 65536  # tokens of the fixed held-out set
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # held out where the source has no split
    max_bytes: Count | None = None  # cap on the training text, in bytes


class OptimizerSpec(Frozen):
    """AdamW; its rate warms up, stays stable and decays, by the fraction of the budget spent.

    The stable rate is `learning_rate · (N / rate_parameters)^(−rate_exponent)`, N the non-embedding parameters now;
    `rates` or `rate_path` replace it.
    """

    learning_rate: Positive = 3e-3  # stable rate at rate_parameters
    rate_exponent: Annotated[float, Field(ge=0, le=2)] = 0.0
    rate_parameters: Count = 100_000  # non-embedding parameters at which the rate is stated
    rate_max: Positive = 0.1  # the stable rate by that law is never above this
    rates: tuple[tuple[int, float], ...] = ()  # (non-embedding parameters, stable rate), log-log interpolated
    rate_path: tuple[tuple[float, float], ...] = ()  # (budget fraction, stable rate), joined by lines
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02  # fraction of the budget over which the rate rises
    decay_from: Annotated[float, Field(gt=0, le=1)] = 0.8  # fraction of the budget at which it starts to fall
    final_rate: Fraction = 0.0  # at the budget's end, relative to the stable one
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1  # on matrices; none on biases and norms
    grad_clip: Positive = 1.0  # largest norm of the whole gradient

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup >= self.decay_from:
            raise ValueError(f"optimizer.warmup is {self.warmup}, but must be below decay_from = {self.decay_from}.")
        for name, what in (("rate_path", "budget fractions"), ("rates", "numbers of parameters")):
            places = [place for place, _ in getattr(self, name)]
            if places != sorted(set(places)) or any(rate <= 0 for _, rate in getattr(self, name)):
                raise ValueError(f"optimizer.{name} must hold rising {what}, each with a rate above 0.")
        if self.rates and self.rates[0][0] < 1:
            raise ValueError(f"optimizer.rates starts at {self.rates[0][0]} parameters, but must at 1 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}, but both must be in [0, 1).")
        return self


class BudgetSpec(Frozen):
    """How much a run may use, and how often the controller decides."""

    axis: Axis = "parameter_seconds"
    amount: Positive = 1e6  # in the axis's own unit
    decisions: Annotated[int, Field(ge=1, le=1000)] = 24  # K, in an episode
    # Budget fractions at which a fork, not charged, is annealed.
    cooldowns: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(max_length=1000)] = ()


class GrowthSpec(Frozen):
    """How far and how a host may grow."""

    max_layers: Layers = 4
    max_parameters: Count | None = None  # none: no cap but max_layers
    min_optimizer_steps: Count = 10  # that a decision must hold after a graft for it to be legal
    probation_steps: Count = 200  # optimizer steps over which a seed's learning rate warms up
    lockout_decisions: Annotated[int, Field(ge=0)] = 4  # in which a graft that was rolled back is not allowed again
    blueprints: dict[str, dict[str, Any]] = Field(default={"attention": {}, "ffn": {}, "block": {}})  # their settings


class RewardSpec(Frozen):
    """The PPO arm's objective, −Loss − Rent."""

    rent: NotNegative = 0.2  # nats that a reference run's parameter-seconds cost
    reference: Positive | None = None  # those; none means the budget, or what the starting size would use


class FleetSpec(Frozen):
    """Where workers run."""

    workers: Annotated[int, Field(ge=1, le=10_000)] | None = None  # none means one a core (or a GPU share)
    cpus: NotNegative = 1.0  # cores of a worker
    gpus: NotNegative = 0.0  # GPUs of a worker; fractions share one
    storage: str | None = None  # where workers save: a path or pyarrow URI that all nodes see; none: beside --out
    deadline: Annotated[float, Field(gt=1)] = 20.0  # times what a decision should take; then its worker is replaced
    grace: Positive = 300.0  # seconds that an order may take beside that: to start, to restore


class PPOSpec(Frozen):
    """PPO (Schulman et al. 2017, 1707.06347) in RLlib's terms; γ is 1 by design."""

    iterations: Count = 20
    decisions: Batch = 256  # that an iteration learns from (train_batch_size)
    minibatch: Batch = 64
    epochs: Count = 6
    learning_rate: Positive = 1e-3
    gae_lambda: Fraction = 0.95
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    entropy: NotNegative = 0.005
    hidden: Annotated[int, Field(ge=4, le=2**12)] = 64  # width of the policy network
    learners: Annotated[int, Field(ge=0, le=1024)] = 0  # learner processes; 0 learns in the driver
    learner_gpus: NotNegative = 0.0  # GPUs of a learner
    held_out: Annotated[int, Field(ge=0, le=64)] = 4  # episodes by which the best policy is chosen; 0 takes the last


class LawSpec(Frozen):
    """Ranges (low, high) of a surrogate's laws (`workers/laws/scaling_law.py`), drawn evenly; "log": in the logarithm.

    The defaults fit no text in particular; `workers/laws/fit.py` fits them to static runs.
    """

    floor: Range = (0.3, 0.3)  # E, nats
    size: Range = (1.2, 1.8)  # A, nats
    size_exponent: Range = (0.4, 0.7)  # α
    data: Range = (0.02, 0.4)  # B, nats; log
    data_exponent: Range = (0.6, 0.9)  # β
    heads: Range = (0.03, 6.0)  # weight of an attention parameter; log
    width: Range = (0.03, 6.0)  # weight of any other parameter; log
    layer: Range = (0.02, 1.0)  # weight of a layer itself, in parameters of the first; log

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in type(self).model_fields:
            low, high = getattr(self, name)
            if low > high or low <= 0:
                raise ValueError(
                    f"laws.{name} is [{low:g}, {high:g}], but must be two numbers above 0, the lower one first."
                )
        return self


class RunSpec(Frozen):
    """A whole run. Saved beside every result."""

    preset: str = "custom"  # name of the preset it came from
    host: HostSpec = HostSpec()
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    clock: ClockSpec = ClockSpec()
    budget: BudgetSpec = BudgetSpec()
    growth: GrowthSpec = GrowthSpec()
    reward: RewardSpec = RewardSpec()
    fleet: FleetSpec = FleetSpec()
    ppo: PPOSpec = PPOSpec()
    laws: LawSpec = LawSpec()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products (autocast)
    threads: Annotated[int, Field(ge=1, le=1024)] = 1  # CPU threads of a run; numbers are equal only at equal threads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.growth.max_layers < self.host.n_layer:
            raise ValueError(
                f"growth.max_layers is {self.growth.max_layers}, but must be at least "
                f"host.n_layer = {self.host.n_layer}."
            )
        if self.host.attention == "flash" and self.dtype != "bfloat16":
            raise ValueError(
                f"host.attention is 'flash', which needs dtype = 'bfloat16', but dtype is {self.dtype!r}: "
                "set dtype=bfloat16, or host.attention=sdpa."
            )
        if self.host.attention == "flash" and self.device == "cpu":
            raise ValueError(
                "host.attention is 'flash', which needs a CUDA GPU, but device is 'cpu': "
                "set device=cuda, or host.attention=sdpa."
            )
        return self

    def training_bytes(self) -> int:
        """About the least memory of training at the starting size, in bytes, without the vocabulary's part.

        Weights, gradients and AdamW's moments in float32; 12 activations of width C per token and layer.
        """
        host, c = self.host, self.host.n_embd
        heads = host.n_head * (host.head_dim or c // host.n_head)
        alike = [(heads, host.mlp_width or 4 * c)] * host.n_layer
        layers = alike if host.layers is None else [(x.heads * heads // host.n_head, x.width) for x in host.layers]
        parameters = sum(4 * c * heads + 2 * c * width for heads, width in layers) + host.block_size * c
        tokens = self.data.batch_size * host.block_size
        return 16 * parameters + 4 * 12 * tokens * c * len(layers)

    def overridden(self, values: Mapping[str, Any]) -> Self:
        """With values by dotted key (`budget.amount`); raises UserError for an unknown key or a value not allowed."""
        dump = self.model_dump(mode="json")
        for key, value in values.items():
            _assign(dump, key, value)
        return type(self).checked(dump, "the spec")


def presets() -> tuple[str, ...]:
    """Names of the presets that ship."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.json")))


def load_spec(preset: str, overrides: Sequence[str] = ()) -> RunSpec:
    """A preset (name or JSON file) with `key.path=value` overrides, JSON or text; raises UserError for a wrong one."""
    values = _read_preset(preset)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override!r} is not of the form key.path=value, such as budget.decisions=12.")
        _assign(values, key, value_of(text))
    try:
        return RunSpec.checked(values, "the spec")
    except UserError:
        RunSpec.checked(_read_preset(preset), preset)
        raise


def saved_spec(path: Path) -> RunSpec:
    """The resolved spec that a run left in its folder."""
    return RunSpec.checked(_read_object(path), str(path))


def value_of(text: str) -> Any:
    """The JSON value that `text` is, or else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_preset(preset: str) -> dict[str, Any]:
    if preset in presets():
        return {"preset": preset, **_read_object(PRESETS / f"{preset}.json")}
    path = Path(preset)
    if path.suffix == ".json" or path.exists():
        return {"preset": path.stem, **_read_object(path)}
    error = unknown("preset", preset, presets())
    raise UserError(f"{error} A path to a JSON file is allowed too.")


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path, str(path), "a JSON file of a spec")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: a spec is an object with keys such as host and budget.")
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {part!r} is a value, not a group of keys: name a key it has.")
    values[last] = value
