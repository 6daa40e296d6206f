"""RunSpec: everything that decides a run's numbers, as frozen models read from a preset and overrides.

Names that need a registry (a blueprint, a host, a tokenizer) are resolved where the registry lives.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from esper.platform.clock import ClockSpec
from esper.platform.errors import UserError, unknown
from esper.platform.ledger import Axis
from esper.platform.model import Frozen
from esper.platform.storage import read_json

PRESETS = Path(__file__).parent / "presets"


class HostSpec(Frozen):
    """The shape a host starts with."""

    kind: Literal["transformer"] = "transformer"
    n_layer: int = Field(2, ge=1, description="layers at the start")
    n_head: int = Field(4, ge=1, description="attention heads of a layer at the start")
    n_embd: int = Field(64, ge=1, description="embedding dimension C")
    block_size: int = Field(64, ge=2, description="context length T, in tokens")
    head_dim: int | None = Field(None, ge=1, description="dimension D of a head; none means n_embd / n_head")
    mlp_width: int | None = Field(None, ge=1, description="neurons of an MLP at the start; none means 4 n_embd")
    tied: bool = Field(True, description="the output head is the token embedding")
    dropout: float = Field(0.0, ge=0, lt=1)
    attention: Literal["sdpa", "flash"] = Field(
        "sdpa", description="torch's own, or flash-attn's, which needs a CUDA GPU, bfloat16 and the extra flash-attn"
    )

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide: "
                "change one of them, or set head_dim."
            )
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.attention == "flash" and head_dim > 256:
            raise ValueError(
                f"host.attention is 'flash', which takes heads of at most 256 dimensions, not {head_dim}: "
                "set host.head_dim, or host.attention=sdpa."
            )
        return self


class DataSpec(Frozen):
    """Text and batches."""

    source: str = Field("tinystories", description="a source name, a text file, a folder of them, or prepared shards")
    tokenizer: str = Field("char", description="char, bpe:N or gpt2")
    batch_size: int = Field(16, ge=1, description="sequences in a batch")
    eval_tokens: int = Field(65536, ge=64, description="tokens of the fixed held-out set")
    valid_fraction: float = Field(0.1, gt=0, lt=1, description="documents held out where the source has no split")
    max_bytes: int | None = Field(None, ge=1, description="cap on the training text, in bytes")


class OptimizerSpec(Frozen):
    """AdamW and its rate: warm-up, stable, decay, by the fraction of the budget spent.

    The stable rate is `learning_rate · (N / rate_parameters)^(−rate_exponent)`, N the non-embedding parameters
    now: an exponent of 0 makes it constant, a positive one lowers it as the network grows.
    """

    learning_rate: float = Field(3e-3, gt=0, description="stable rate at rate_parameters")
    rate_exponent: float = Field(0.0, ge=0, le=2, description="how fast the stable rate falls with size")
    rate_parameters: int = Field(100_000, ge=1, description="non-embedding parameters at which the rate is stated")
    rate_max: float = Field(0.1, gt=0, description="the stable rate is never above this")
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the budget over which the rate rises")
    decay_from: float = Field(0.8, gt=0, le=1, description="fraction of the budget at which the rate starts to fall")
    final_rate: float = Field(0.0, ge=0, le=1, description="rate at the budget's end, relative to the stable one")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices; none on biases and norms")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup >= self.decay_from:
            raise ValueError(f"optimizer.warmup is {self.warmup}, but must be below decay_from = {self.decay_from}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}, but both must be in [0, 1).")
        return self


class BudgetSpec(Frozen):
    """How much a run may use, and how often the gardener decides."""

    axis: Axis = "parameter_seconds"
    amount: float = Field(1e6, gt=0, description="in the axis's own unit")
    decisions: int = Field(24, ge=1, le=1000, description="decisions K in an episode")
    cooldowns: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (), description="budget fractions whose annealed loss is taken on a fork, not charged"
    )


class GrowthSpec(Frozen):
    """How far and how a host may grow."""

    max_layers: int = Field(4, ge=1, description="layers at most")
    max_parameters: int | None = Field(None, ge=1, description="parameters at most; none means no cap but max_layers")
    min_optimizer_steps: int = Field(
        10, ge=1, description="steps a decision must hold after a graft for it to be legal"
    )
    probation_steps: int = Field(200, ge=1, description="optimizer steps over which a seed's learning rate warms up")
    cooling_decisions: int = Field(
        4, ge=0, description="decisions for which a graft that was rolled back is not allowed again"
    )
    blueprints: dict[str, dict[str, Any]] = Field(
        {"attention": {}, "ffn": {}, "block": {}}, description="blueprints in use, with their settings"
    )


class RewardSpec(Frozen):
    """The PPO arm's objective, −Loss − Rent."""

    rent: float = Field(0.2, ge=0, description="nats that a reference run's parameter-seconds cost")
    reference: float | None = Field(
        None, gt=0, description="those parameter-seconds; none means the budget, or what the starting size would use"
    )


class FleetSpec(Frozen):
    """Where workers run."""

    workers: int | None = Field(None, ge=1, description="GrowthWorkers; none means one a core (or a GPU share)")
    cpus: float = Field(1.0, ge=0, description="cores of a worker")
    gpus: float = Field(0.0, ge=0, description="GPUs of a worker; fractions share one")
    storage: str | None = Field(
        None, description="where workers save their runs: a path or pyarrow URI that all nodes see; none: beside --out"
    )
    deadline: float = Field(
        20.0, gt=1, description="a decision may take this many times what it should; then its worker is replaced"
    )
    grace: float = Field(300.0, gt=0, description="seconds that an order may take beside that: to start, to restore")


class PPOSpec(Frozen):
    """Simic's PPO (Schulman et al. 2017, 1707.06347), in RLlib's terms; γ is 1 by design."""

    iterations: int = Field(20, ge=1)
    decisions: int = Field(256, ge=8, description="decisions an iteration learns from (train_batch_size)")
    minibatch: int = Field(64, ge=8)
    epochs: int = Field(6, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0, lt=1)
    entropy: float = Field(0.005, ge=0)
    hidden: int = Field(64, ge=4, description="width of the policy network")
    learners: int = Field(0, ge=0, description="learner processes; 0 learns in the driver")
    learner_gpus: float = Field(0.0, ge=0, description="GPUs of a learner")


class RunSpec(Frozen):
    """A whole run. Saved beside every result."""

    preset: str = Field("custom", description="name of the preset it came from")
    host: HostSpec = HostSpec()
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    clock: ClockSpec = ClockSpec()
    budget: BudgetSpec = BudgetSpec()
    growth: GrowthSpec = GrowthSpec()
    reward: RewardSpec = RewardSpec()
    fleet: FleetSpec = FleetSpec()
    ppo: PPOSpec = PPOSpec()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of matrix products (autocast)")
    threads: int = Field(1, ge=1, description="CPU threads of a run; numbers are equal only at equal threads")

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


def presets() -> tuple[str, ...]:
    """Names of the presets that ship."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.json")))


def load_spec(preset: str, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of a preset (a name or a JSON file) with `key.path=value` overrides applied.

    A value is read as JSON where it is JSON (`8`, `0.1`, `null`, `[0.9, 0.95]`), else as text.

    Raises:
        UserError: unknown preset or key, or a value that is not allowed.
    """
    values = _read_preset(preset)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override!r} is not of the form key.path=value, such as budget.decisions=12.")
        _assign(values, key.split("."), _value(text), key)
    return RunSpec.checked(values, "the spec")


def saved_spec(path: Path) -> RunSpec:
    """The resolved spec that a run left in its folder."""
    return RunSpec.checked(_read_json(path), str(path))


def _read_preset(preset: str) -> dict[str, Any]:
    if preset in presets():
        return {"preset": preset, **_read_json(PRESETS / f"{preset}.json")}
    path = Path(preset)
    if path.suffix == ".json" or path.exists():
        return {"preset": path.stem, **_read_json(path)}
    error = unknown("preset", preset, presets())
    raise UserError(f"{error} A path to a JSON file is allowed too.")


def _read_json(path: Path) -> dict[str, Any]:
    values = read_json(path, str(path), "a JSON file of a spec")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: a spec is an object with keys such as host and budget.")
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assign(values: dict[str, Any], path: Iterable[str], value: Any, key: str) -> None:
    *parents, last = path
    node = values
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {key}: {part!r} is a value, not a group of keys: name a key it has.")
        node = child
    node[last] = value
