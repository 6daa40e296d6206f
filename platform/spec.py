"""RunSpec: everything that decides a run's numbers, from a preset and overrides.

Sizes that memory depends on are bounded. Names (blueprint, host, tokenizer) are resolved by their registries.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from esper.platform.clock import ClockSpec
from esper.platform.console import counted
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
Share = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
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


def by_kind(default: str, *others: str) -> Discriminator:
    """Tells the members of a union by their `kind`; what has none is of the default's."""

    def kind(value: Any) -> str:
        return str(value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", default))

    known = " or ".join(map(repr, (default, *others)))
    return Discriminator(kind, custom_error_type="unknown_kind", custom_error_message=f"its kind must be {known}.")


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

    @property
    def parts(self) -> list[str]:
        """Names of the parts inside it."""
        return [f"e{expert.uid}" for expert in self.experts]

    def without(self, part: str) -> Self:
        return self.model_copy(update={"experts": tuple(each for each in self.experts if f"e{each.uid}" != part)})


class HostSpec(Frozen):
    """The shape a transformer starts with."""

    takes: ClassVar[str] = "text"  # the kind of data
    whole: ClassVar[int] = 1  # that widths are multiples of

    kind: Literal["transformer"] = "transformer"
    n_layer: Layers = 2
    n_head: Heads = 4  # attention heads of a layer
    n_embd: Annotated[int, Field(ge=1, le=2**16)] = 64  # embedding dimension C
    block_size: Annotated[int, Field(ge=2, le=2**17)] = 64  # context length T, in tokens
    head_dim: Annotated[int, Field(ge=1, le=2**12)] | None = None  # dimension D of a head; none means n_embd / n_head
    mlp_width: Neurons | None = None  # of an MLP; none means 4 n_embd
    layers: Annotated[tuple[LayerSpec, ...], Field(max_length=512)] | None = None  # as in a summary's `shape`; or alike
    tied: bool = True  # the output head is the token embedding
    dropout: BelowOne = 0.0
    attention: Literal["sdpa", "flash"] = "sdpa"  # torch's own, or flash-attn's: CUDA, bfloat16, the extra flash-attn

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.n_embd % self.n_head:
            what = f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide"
            raise ValueError(f"{what}: change one of them, or set head_dim.")
        if self.layers is not None and len(self.layers) != self.n_layer:
            raise ValueError(f"n_layer is {self.n_layer}, but must be the number of layers given, {len(self.layers)}.")
        return self

    @property
    def tokens(self) -> int:
        """Of an example, which has a target each: the context length."""
        return self.block_size

    @property
    def positions(self) -> int:
        """Of an example, at which the network is computed: what evaluations are cut by."""
        return self.block_size

    @property
    def activations(self) -> int:
        """That the backward pass needs of an example and layer, about: 12 of width C per token."""
        return 12 * self.block_size * self.n_embd

    @property
    def own_width(self) -> int:
        return self.mlp_width or 4 * self.n_embd

    @property
    def own_heads(self) -> int:
        return self.n_head

    def alike(self, n_layer: int, width: int, heads: int) -> tuple[LayerSpec, ...]:
        """So many layers of one shape, for `layers`."""
        return tuple(LayerSpec(uid=uid, heads=heads, width=width) for uid in range(n_layer))

    def starting_with(self, n_layer: int | None) -> Self:
        """With `n_layer` layers of equal shape; unchanged for None."""
        return self if n_layer is None else self.model_copy(update={"n_layer": n_layer, "layers": None})

    def unfit(self, dtype: str, device: str) -> str | None:
        """Why these cannot run it, as a sentence, or None."""
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.attention == "flash" and (dtype != "bfloat16" or device == "cpu" or head_dim > 256):
            return (
                "host.attention is 'flash', which needs dtype = bfloat16, a CUDA GPU and heads of at most 256 "
                f"dimensions (not {dtype}, {device}, {head_dim}): set these, or host.attention=sdpa."
            )
        return None

    def __str__(self) -> str:
        layers, heads = counted(self.n_layer, "layer"), counted(self.n_head, "head")
        return f"GPT of {layers}, {heads}, C = {self.n_embd}, T = {self.block_size}"


STAGES = 3  # of a ResNet: each has twice the channels of the one before, at half the resolution


class BlockSpec(Frozen):
    """A residual block that a ResNet is born with."""

    uid: Annotated[int, Field(ge=0)]  # names its sites: h<uid>.conv, h<uid>.stream
    stage: Annotated[int, Field(ge=0, lt=STAGES)]
    width: Neurons  # hidden channels, between its two convolutions
    gate: Annotated[int, Field(ge=0, le=2**20)] = 0  # neurons of its channel attention; 0: it has none

    @property
    def parts(self) -> list[str]:
        """Names of the parts inside it."""
        return ["gate"] if self.gate else []

    def without(self, part: str) -> Self:
        return self.model_copy(update={"gate": 0})


class ResNetSpec(Frozen):
    """The shape a ResNet starts with. Its blocks are spread over the stages."""

    takes: ClassVar[str] = "images"
    tokens: ClassVar[int] = 1  # an image counts as one
    dropout: ClassVar[float] = 0.0
    own_heads: ClassVar[int] = 1

    kind: Literal["resnet"] = "resnet"
    n_layer: Layers = 3  # blocks of all stages
    channels: Annotated[int, Field(ge=1, le=2**14)] = 16  # C, of the first stage's stream
    width: Neurons | None = None  # hidden channels of a block of the first stage, doubled like C; none means C
    image_size: Annotated[int, Field(ge=2**STAGES, le=2**11)] = 32  # height and width, in pixels; a norm needs several
    image_channels: Annotated[int, Field(ge=1, le=2**8)] = 3
    norm: Literal["group", "batch"] = "group"
    group: Neurons = 8  # channels that share the mean and variance of a GroupNorm
    layers: Annotated[tuple[BlockSpec, ...], Field(max_length=512)] | None = None  # as in a summary's `shape`

    @model_validator(mode="after")
    def _check(self) -> Self:
        widths = [self.channels, self.own_width, *(layer.width for layer in self.layers or ())]
        if odd := next((width for width in widths if width % self.whole), None):
            what = f"{odd} channels are no whole groups of host.group = {self.group}"
            raise ValueError(f"{what}: take multiples of it, change it, or set host.norm=batch.")
        if self.layers is not None and len(self.layers) != self.n_layer:
            raise ValueError(f"n_layer is {self.n_layer}, but must be the number of layers given, {len(self.layers)}.")
        stages = [layer.stage for layer in self.layers or ()]
        if stages != sorted(stages):
            raise ValueError(f"layers are of the stages {stages}, which must rise from the input on.")
        return self

    @property
    def whole(self) -> int:
        """That widths are multiples of."""
        return self.group if self.norm == "group" else 1

    @property
    def positions(self) -> int:
        """Of an image: its pixels, of which most of the network sees a quarter or less."""
        return self.image_size**2 // 4

    @property
    def activations(self) -> int:
        """That the backward pass needs of an image and block, about: six of the hidden width a pixel."""
        return 6 * self.image_size**2 * max(self.channels, self.own_width)

    @property
    def own_width(self) -> int:
        """Of a first stage's block that is not told otherwise."""
        return self.width or self.channels

    def alike(self, n_layer: int, width: int, heads: int) -> tuple[BlockSpec, ...]:
        """So many blocks of one shape, for `layers`: the stages get one in turn, the first one first."""
        if heads != self.own_heads:
            raise UserError("a ResNet has no attention heads: give sizes without them, such as 3x32, blocks x width.")
        stages = sorted(uid % STAGES for uid in range(n_layer))
        return tuple(BlockSpec(uid=uid, stage=stage, width=width << stage) for uid, stage in enumerate(stages))

    def starting_with(self, n_layer: int | None) -> Self:
        """With `n_layer` blocks of the usual shape; unchanged for None."""
        return self if n_layer is None else self.model_copy(update={"n_layer": n_layer, "layers": None})

    def unfit(self, dtype: str, device: str) -> str | None:
        """Why these cannot run it, as a sentence, or None."""
        return None

    def __str__(self) -> str:
        image = f"{self.image_size} × {self.image_size} × {self.image_channels}"
        return f"ResNet of {counted(self.n_layer, 'block')}, C = {self.channels}, images of {image}"


Host = Annotated[
    Annotated[HostSpec, Tag("transformer")] | Annotated[ResNetSpec, Tag("resnet")], by_kind("transformer", "resnet")
]


class _Hosted(Frozen):
    host: Host


def read_host(values: Any, what: str) -> HostSpec | ResNetSpec:
    """The host's settings of either kind, of plain values; raises UserError as `checked` does."""
    return _Hosted.checked({"host": values}, what).host


class DataSpec(Frozen):
    """Text and batches."""

    unit: ClassVar[str] = "token"  # what losses are a mean over, and ledgers count
    classifies: ClassVar[bool] = False  # whether accuracy, the share of targets foretold, is told beside the loss

    kind: Literal["text"] = "text"
    source: str = "tinystories"  # a source name, a text file, a folder of them, or prepared shards
    tokenizer: str = "char"  # char, bpe:N or gpt2
    batch_size: Annotated[int, Field(ge=1, le=2**14)] = 16  # sequences in a batch
    eval_tokens: Annotated[int, Field(ge=64, le=2**26)] = 65536  # of the held-out set that final losses are taken on
    decision_tokens: Annotated[int, Field(ge=64, le=2**26)] = 8192  # of these, that the loss at a decision is taken on
    valid_fraction: Share = 0.1  # held out where the source has no split
    max_bytes: Count | None = None  # cap on the training text, in bytes

    @property
    def held_out_tokens(self) -> tuple[int, int]:
        """On which final losses are taken, and those at decisions."""
        return self.eval_tokens, self.decision_tokens

    @property
    def encoding(self) -> str:
        return self.tokenizer


class ImageSpec(Frozen):
    """Images, their classes, and batches. An image counts as one token."""

    unit: ClassVar[str] = "image"
    classifies: ClassVar[bool] = True
    encoding: ClassVar[str] = "images"

    kind: Literal["images"] = "images"
    source: str = "digits"  # a source name, an .npz file, a folder of CIFAR-10's python batches, or prepared images
    size: Annotated[int, Field(ge=1, le=2**11)] | None = None  # pixels a side, averaged down to; none: as they come
    batch_size: Annotated[int, Field(ge=1, le=2**14)] = 32  # images in a batch
    crop: Annotated[int, Field(ge=0, le=2**8)] = 0  # pixels that training images are shifted by at most
    flip: bool = False  # half of the training images, left to right
    eval_images: Annotated[int, Field(ge=1, le=2**20)] = 10_000  # of the held-out set that final losses are taken on
    decision_images: Annotated[int, Field(ge=1, le=2**20)] = 1000  # of these, that the loss at a decision is taken on
    valid_fraction: Share = 0.2  # held out where the source has no split
    max_images: Count | None = None  # cap on the training images

    @property
    def held_out_tokens(self) -> tuple[int, int]:
        return self.eval_images, self.decision_images


Data = Annotated[Annotated[DataSpec, Tag("text")] | Annotated[ImageSpec, Tag("images")], by_kind("text", "images")]


class OptimizerSpec(Frozen):
    """AdamW; its rate warms up, stays stable and decays, by the fraction of the budget spent.

    The stable rate is `learning_rate · (N / rate_parameters)^(−rate_exponent)`, N the non-embedding parameters now;
    `rates` or `rate_path` replace it.
    """

    learning_rate: Positive = 3e-3  # stable rate at rate_parameters
    rate_exponent: Annotated[float, Field(ge=0, le=2)] = 0.0
    rate_parameters: Count = 100_000  # non-embedding parameters at which the rate is stated
    rate_max: Positive = 0.1  # the stable rate by that law is never above this
    rates: Rates = ()  # (non-embedding parameters, stable rate), log-log interpolated
    rate_path: RatePath = ()  # (budget fraction, stable rate), joined by lines
    warmup: BelowOne = 0.02  # fraction of the budget over which the rate rises
    decay_from: Annotated[float, Field(gt=0, le=1)] = 0.8  # fraction of the budget at which it starts to fall
    final_rate: Fraction = 0.0  # at the budget's end, relative to the stable one
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1  # on matrices; none on biases and norms
    grad_clip: Positive = 1.0  # largest norm of the whole gradient

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup >= self.decay_from:
            raise ValueError(f"warmup is {self.warmup}, but must be below decay_from = {self.decay_from}.")
        return self


class BudgetSpec(Frozen):
    """How much a run may use, and how often the controller decides."""

    axis: Axis = "parameter_seconds"
    amount: Positive = 1e6  # in the axis's own unit
    decisions: Annotated[int, Field(ge=1, le=1000)] = 24  # K, in an episode
    # Budget fractions at which a fork, not charged, is annealed.
    cooldowns: Annotated[tuple[Share, ...], Field(max_length=1000)] = ()


class GrowthSpec(Frozen):
    """How far and how a host may grow."""

    max_layers: Layers = 4
    max_parameters: Count | None = None  # none: no cap but max_layers
    min_optimizer_steps: Count = 10  # that a decision must hold after a graft for it to be legal
    probation_steps: Count = 200  # optimizer steps over which a seed's learning rate warms up
    lockout_decisions: Annotated[int, Field(ge=0)] = 4  # in which a graft that was rolled back is not allowed again
    blueprints: dict[str, dict[str, Any]] = Field(default={"attention": {}, "ffn": {}, "block": {}})  # their settings


class TrainerSpec(Frozen):
    """How steps are computed."""

    # By a compiled step (`workers/tolaria/compiled.py`) where the host has no young seeds: auto where that should save
    # more time than its build takes, on wherever possible, off never.
    compile: Literal["auto", "on", "off"] = "auto"


class RewardSpec(Frozen):
    """The PPO arm's objective, −Loss − Rent."""

    rent: NotNegative = 0.2  # nats that a reference run's parameter-seconds cost
    reference: Positive | None = None  # those; none means the budget, or what the starting size would use


class FleetSpec(Frozen):
    """Where workers run."""

    workers: Annotated[int, Field(ge=1, le=10_000)] | None = None  # none means one a core (or a GPU share)
    cpus: NotNegative = 1.0  # cores of a worker
    gpus: Gpus = 0.0  # GPUs of a worker; fractions share one
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
    clip: Share = 0.2
    entropy: NotNegative = 0.005
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
    size_exponent: Range = (0.4, 0.7)  # α
    data: Range = (0.02, 0.4)  # B, nats; log
    data_exponent: Range = (0.6, 0.9)  # β
    heads: Range = (0.03, 6.0)  # weight of an attention parameter; log
    width: Range = (0.03, 6.0)  # weight of any other parameter; log
    layer: Range = (0.02, 1.0)  # weight of a layer itself, in parameters of the first; log
    depth: RangeFrom0 = (0.0, 0.0)  # λ: A falls as layers^(−λ)
    slowness: RangeFrom0 = (0.0, 0.0)  # κ: tokens count layers^(−κ)


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
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
