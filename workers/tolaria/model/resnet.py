"""ResNetHost: a pre-activation ResNet (He et al. 2016, 1603.05027) of three stages that can grow while it trains.

Departure: the way from a stage to the next is a part of its own, pooling and a 1×1 convolution (the shortcut of
ResNet-D, 1812.01187), so that all blocks of a stage are alike and a stage may have none.
Its shape comes first: sites, parameters and FLOPs in closed form, without tensors. Convolutions are 3×3 and have no
bias, as a norm or the stream comes after them. B batch, C channels of the stream (of the first stage, doubled in each
that follows), W hidden channels of a block, R neurons of channel attention, S pixels a side.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import InjectionSpec
from esper.platform.errors import UserError
from esper.platform.host_spec import STAGES, BlockSpec, ResNetSpec
from esper.workers.kasmina.registry import names_for
from esper.workers.tolaria.model.layered import LayeredHost, LayeredShape, Pairs

TAPS = 9  # weights of a 3×3 convolution for each pair of channels
MOMENTUM = 0.1  # a batch's share of BatchNorm's running mean and variance


@dataclass(frozen=True)
class ResNetShape(LayeredShape):
    """A ResNet's shape; its sites: `s<n>.stream` where stage n begins, `h<uid>.conv` and `.stream` of each block."""

    classes: int
    image_size: int
    image_channels: int
    channels: int
    width: int  # hidden channels of a block that is born in the first stage
    group: int  # that widths are multiples of
    born: BlockSpec  # the next new block
    layers: tuple[BlockSpec, ...]

    @classmethod
    def of(cls, host: ResNetSpec, classes: int) -> Self:
        layers = host.layers or host.alike(host.n_layer, host.own_width, host.own_heads)
        born = BlockSpec(uid=1 + max(layer.uid for layer in layers), stage=0, width=host.own_width)
        sizes = host.image_size, host.image_channels, host.channels, host.own_width
        return cls(classes, *sizes, host.whole, born, layers)

    def stream(self, stage: int) -> int:
        return self.channels << stage

    def injection_specs(self) -> tuple[InjectionSpec, ...]:
        """The start of each stage and two per block, in forward order."""
        conv, stream, specs, before = names_for("conv"), names_for("conv_stream"), [], 0
        for stage in range(STAGES):
            blocks = [layer for layer in self.layers if layer.stage == stage]
            depth, start = before / len(self.layers), self._stem() if stage == 0 else self._down(stage)
            specs.append(InjectionSpec(f"s{stage}.stream", "conv_stream", depth, stream, 0, start))
            for i, layer in enumerate(blocks, start=before):
                at, after = ((i + place) / len(self.layers) for place in (0.5, 1))
                own, name = self._block(layer), f"h{layer.uid}"
                specs += [
                    InjectionSpec(f"{name}.conv", "conv", at, conv, layer.width, own - 2 * self.stream(stage)),
                    InjectionSpec(f"{name}.stream", "conv_stream", after, stream, 0, own),
                ]
            before += len(blocks)
        return tuple(specs)

    def parameters_count(self, *, non_embedding: bool = False) -> int:
        """Count of parameters; `non_embedding` leaves out the stem and the head, which every size has."""
        last = self.stream(STAGES - 1)
        body = sum(map(self._block, self.layers)) + sum(map(self._down, range(1, STAGES))) + 2 * last
        return body if non_embedding else body + self._stem() + last * self.classes + self.classes

    def flops_per_token(self) -> int:
        """Training FLOPs per image, three times the forward's products, 2 per weight and pixel; norms are left out."""
        forward = self._stem() * self._pixels(0) + self.stream(STAGES - 1) * self.classes
        forward += sum(self._down(stage) * self._pixels(stage) for stage in range(1, STAGES))
        for layer in self.layers:
            channels = self.stream(layer.stage)
            forward += 2 * TAPS * channels * layer.width * self._pixels(layer.stage) + 2 * channels * layer.gate
        return 3 * 2 * forward

    def experts(self) -> int:
        """Channel attentions: gated parts too, which cost a fixed time."""
        return sum(layer.gate > 0 for layer in self.layers)

    def expert_parameters(self) -> int:
        return sum(self._gate(layer) for layer in self.layers)

    def totals(self) -> tuple[int, ...]:
        of = [[layer for layer in self.layers if layer.stage == stage] for stage in range(STAGES)]
        counts = ((len(here), sum(each.width for each in here), sum(each.gate for each in here)) for here in of)
        return tuple(number for stage in counts for number in stage)

    def with_units(self, site_id: str, units: int) -> Self:
        """A copy with `units` more hidden channels at a site; fewer, if negative."""
        return self._with(site_id, width=self.layer(site_id).width + units)

    def with_gate(self, site_id: str, neurons: int) -> Self:
        return self._with(site_id, gate=neurons)

    def with_layer(self, site_id: str) -> Self:
        stage = int(site_id[1]) if site_id.startswith("s") else self.layer(site_id).stage
        return self._inserted(self.position(site_id), stage=stage, width=self.width << stage)

    def position(self, stream_id: str) -> int:
        """Index of a block inserted at this stream site; `ValueError` for any other id."""
        starts = {f"s{n}.stream": sum(layer.stage < n for layer in self.layers) for n in range(STAGES)}
        ends = {f"h{layer.uid}.stream": i for i, layer in enumerate(self.layers, start=1)}
        if stream_id not in starts | ends:
            raise ValueError(f"{stream_id} is no site of the stream")
        return (starts | ends)[stream_id]

    def check_width(self, width: int, what: str) -> None:
        """Raise UserError where so many channels are no whole groups of the norm."""
        if width % self.group:
            raise UserError(f"{what} is {width}, but must be a multiple of host.group = {self.group}.")

    def _pixels(self, stage: int) -> int:
        return (self.image_size >> stage) ** 2

    def _stem(self) -> int:
        return TAPS * self.image_channels * self.channels

    def _down(self, stage: int) -> int:
        """Parameters of the way into a stage: a 1×1 convolution of pooled pixels."""
        return self.stream(stage - 1) * self.stream(stage)

    def _block(self, layer: BlockSpec) -> int:
        c = self.stream(layer.stage)
        return 2 * TAPS * c * layer.width + 2 * c + 2 * layer.width + self._gate(layer)

    def _gate(self, layer: BlockSpec) -> int:
        c, r = self.stream(layer.stage), layer.gate
        return 2 * c * r + r + c if r else 0


class Norm(nn.Module):
    """Of however many channels: over groups of them (Wu & He 2018, 1803.08494), or each over the batch (1502.03167).

    In evaluation BatchNorm normalises by its running mean and variance. While the rate is high these lag behind the
    weights (2105.07576): on digits at 0.04 the held-out loss is 1.8 nats by them and 0.3 by the batch's own, whether a
    block was grafted or not. So losses between decisions tell little there; the rate's decay lets them catch up.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, spec: ResNetSpec, channels: int) -> None:
        super().__init__()
        self.group = spec.group if spec.norm == "group" else None
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        if self.group is None:
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, S, S) → (B, C, S, S)."""
        if self.group is not None:
            return F.group_norm(x, x.shape[1] // self.group, self.weight, self.bias)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, MOMENTUM)


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    """A convolution that keeps the resolution."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


class Gate(nn.Module):
    """Channel attention: scales each channel of a branch by what all channels' means say."""

    def __init__(self, channels: int, neurons: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(channels, neurons)
        self.c_proj = nn.Linear(neurons, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.c_proj(F.silu(self.c_fc(x.mean((2, 3)))))  # (B, C)
        return x * (2 * scale.sigmoid())[:, :, None, None]

    def outgoing(self) -> list[Tensor]:
        return [self.c_proj.weight, self.c_proj.bias]


class Block(nn.Module):
    """A residual block: norm, relu, convolution, twice, and channel attention where it has grown."""

    def __init__(self, spec: ResNetSpec, channels: int, layer: BlockSpec) -> None:
        super().__init__()
        self.uid, self.stage = layer.uid, layer.stage
        self.norm_1, self.conv_1 = Norm(spec, channels), conv(channels, layer.width)
        self.norm_2, self.conv_2 = Norm(spec, layer.width), conv(layer.width, channels)
        self.inside = nn.ModuleDict()
        if layer.gate:
            self.add_gate(layer.gate)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, S, S) → (B, C, S, S)."""
        hidden = self.conv_1(F.relu(self.norm_1(x)))  # (B, W, S, S)
        branch = self.conv_2(F.relu(self.norm_2(hidden)))
        return x + (self.inside["gate"](branch) if len(self.inside) else branch)

    def add_gate(self, neurons: int) -> Gate:
        """Put channel attention behind the branch, uninitialised."""
        new = Gate(self.conv_2.weight.shape[0], neurons).to(self.conv_2.weight)
        self.inside["gate"] = new.train(self.training)
        return new

    def shape(self) -> BlockSpec:
        gate = sum(gate.c_fc.out_features for gate in self.inside.values() if isinstance(gate, Gate))
        return BlockSpec(uid=self.uid, stage=self.stage, width=self.conv_1.weight.shape[0], gate=gate)

    def outgoing(self) -> list[Tensor]:
        return [self.conv_2.weight]


class ResNetHost(LayeredHost):
    """The host; implements HostProtocol. Weights are drawn from the CPU `generator`, by default the global one."""

    Shape = ResNetShape
    OUTPUTS = "head.weight"

    def __init__(self, spec: ResNetSpec, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        self._shape = ResNetShape.of(spec, classes)
        streams = [self._shape.stream(stage) for stage in range(STAGES)]
        self.stem = conv(spec.image_channels, streams[0])
        self.h = nn.ModuleList(self._block(layer) for layer in self._shape.layers)
        self.down = nn.ModuleList(conv(*pair, size=1) for pair in pairwise(streams))
        self.norm = Norm(spec, streams[-1])
        self.head = nn.Linear(streams[-1], classes)
        if not self.head.weight.is_meta:  # where random numbers import torch's compiler, which takes a second
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Convolutions N(0, 2/fan-in) (1502.01852), a block's last one over √L blocks; the head N(0, 0.02²)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02 if name == "head.weight" else math.sqrt(2 / parameter[0].numel())
            std /= math.sqrt(len(self.h)) if name.endswith("conv_2.weight") else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, image_channels, S, S) → logits (B, classes)."""
        for stream in self._streams(images):
            x = stream[1]
        return self.head(F.relu(self.norm(x)).mean((2, 3)))  # (B, C) → (B, classes)

    def linears(self, site_id: str) -> tuple[nn.Module, ...]:
        """A block's convolutions and the norm between them."""
        block, _ = self.at(site_id)
        return block.conv_1, block.norm_2, block.conv_2

    def written_by(self, site_id: str) -> Iterator[Tensor]:
        """The parameters behind a site's telemetry; for a stream site, those that wrote the stream there."""
        if site_id.startswith("s"):
            stage = int(site_id[1])
            return (self.down[stage - 1] if stage else self.stem).parameters()
        block, part = self.at(site_id)
        modules = [block.conv_1, block.norm_2, block.conv_2, block.inside] if part == "conv" else [block]
        return (parameter for module in modules for parameter in module.parameters())

    @torch.no_grad()
    def stream_sizes(self) -> dict[str, float]:
        """Stream site → RMS of the stream there on random images."""
        training = self.training
        self.eval()
        size = (4, self.spec.image_channels, self.spec.image_size, self.spec.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(self.stem.weight)
        sizes = {site: stream.float().square().mean().sqrt().item() for site, stream in self._streams(images)}
        self.train(training)
        return sizes

    def insert(self, site_id: str, shape: ResNetShape) -> tuple[str, Pairs]:
        """Siblings are those of the block before (else behind) it; a gate's are its block's `conv_1` and `norm_1`."""
        name = shape.part_after(self.shape)
        layer = shape.layer(name)
        if "." not in name:
            return self._put_in(name, shape, self.shape.position(site_id), self._block(layer))
        block, _ = self.at(site_id)
        siblings = {"weight": block.conv_1.weight, "bias": block.norm_1.bias}
        new = block.add_gate(layer.gate).named_parameters()
        return name, [(parameter, siblings[key.rpartition(".")[2]]) for key, parameter in new]

    def _streams(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Stream site → the stream there, (B, C, S, S), from input to output."""
        # Channels last in memory: a tenth to a quarter less time on a CPU. Weights stay as they are.
        x, stage = self.stem(images.contiguous(memory_format=torch.channels_last)), 0
        yield "s0.stream", x
        for block in [*self.h, None]:
            while stage < (STAGES - 1 if block is None else block.stage):
                x, stage = self.down[stage](F.avg_pool2d(x, 2)), stage + 1
                yield f"s{stage}.stream", x
            if block is not None:
                x = block(x)
                yield f"h{block.uid}.stream", x

    def _block(self, layer: BlockSpec) -> Block:
        return Block(self.spec, self._shape.stream(layer.stage), layer)
