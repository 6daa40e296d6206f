"""The settings of each kind of host, and what the rest asks of them by name."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from esper.platform.console import counted
from esper.platform.errors import UserError
from esper.platform.frozen import BelowOne, Frozen, Heads, Layers, Neurons, by_kind

Activation = Literal["gelu_new", "gelu"]  # GELU by its tanh formula, as in GPT-2, or exact, as in nanoGPT


class ExpertSpec(Frozen):
    """An expert that a host is born with."""

    uid: Annotated[int, Field(ge=0)]  # names it: e<uid>
    width: Neurons  # hidden, between its two matrices
    share: Annotated[float, Field(gt=0, le=1)]  # of the tokens that its gate is balanced to


class LayerSpec(Frozen):
    """A layer that a host is born with."""

    uid: Annotated[int, Field(ge=0)]  # names its sites: h<uid>.attention, …
    heads: Heads  # of its attention
    width: Neurons  # of the MLP
    experts: Annotated[tuple[ExpertSpec, ...], Field(max_length=256)] = ()  # beside the MLP

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

    kind: Literal["transformer"] = "transformer"  # takes text
    n_layer: Layers = 2  # layers to start with
    n_head: Heads = 4  # attention heads of a layer
    n_embd: Annotated[int, Field(ge=1, le=2**16)] = 64  # embedding dimension C
    block_size: Annotated[int, Field(ge=2, le=2**17)] = 64  # context length T, in tokens
    head_dim: Annotated[int, Field(ge=1, le=2**12)] | None = None  # dimension D of a head; none means n_embd / n_head
    mlp_width: Neurons | None = None  # of an MLP; none means 4 n_embd
    layers: Annotated[tuple[LayerSpec, ...], Field(max_length=512)] | None = None  # as in a summary's `shape`; or alike
    tied: bool = True  # the output head is the token embedding
    dropout: BelowOne = 0.0  # probability, of embeddings, attention weights and branches
    activation: Activation = "gelu_new"  # of the MLPs
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
    stage: Annotated[int, Field(ge=0, lt=STAGES)]  # that it is in
    width: Neurons  # hidden channels, between its two convolutions
    gate: Annotated[int, Field(ge=0, le=2**20)] = 0  # neurons of its channel attention; 0: it has none

    @property
    def parts(self) -> list[str]:
        return ["gate"] if self.gate else []

    def without(self, part: str) -> Self:
        return self.model_copy(update={"gate": 0})


class ResNetSpec(Frozen):
    """The shape a ResNet starts with. Its blocks are spread over the stages."""

    takes: ClassVar[str] = "images"
    tokens: ClassVar[int] = 1  # an image counts as one
    dropout: ClassVar[float] = 0.0
    own_heads: ClassVar[int] = 1

    kind: Literal["resnet"] = "resnet"  # takes images
    n_layer: Layers = 3  # blocks of all stages
    channels: Annotated[int, Field(ge=1, le=2**14)] = 16  # C, of the first stage's stream
    width: Neurons | None = None  # hidden channels of a block of the first stage, doubled like C; none means C
    image_size: Annotated[int, Field(ge=2**STAGES, le=2**11)] = 32  # height and width, in pixels; a norm needs several
    image_channels: Annotated[int, Field(ge=1, le=2**8)] = 3  # 1 for grey, 3 for colours
    norm: Literal["group", "batch"] = "group"  # GroupNorm or BatchNorm
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
        return None

    def __str__(self) -> str:
        image = f"{self.image_size} × {self.image_size} × {self.image_channels}"
        return f"ResNet of {counted(self.n_layer, 'block')}, C = {self.channels}, images of {image}"


Host = Annotated[HostSpec | ResNetSpec, by_kind(HostSpec, ResNetSpec)]


class _Hosted(Frozen):
    host: Host


def read_host(values: Any, what: str) -> HostSpec | ResNetSpec:
    """The host's settings of either kind, of plain values; raises UserError as `checked` does."""
    return _Hosted.checked({"host": values}, what).host
