"""ResNetHost: a pre-activation ResNet (He et al. 2016, 1603.05027) of three stages that can grow while it trains.

Departure: the way from a stage to the next is a part of its own, pooling and a 1×1 convolution (the shortcut of
ResNet-D, 1812.01187), so that all blocks of a stage are alike and a stage may have none.
B batch, C channels of the stream, W hidden channels of a block, R neurons of channel attention, S pixels a side.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.host_spec import STAGES, BlockSpec, ResNetSpec
from esper.workers.tolaria.model.layered import LayeredHost, Pairs
from esper.workers.tolaria.model.resnet_shape import ResNetShape

MOMENTUM = 0.1  # a batch's share of BatchNorm's running mean and variance


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
        """Insert the part that only `shape` has, uninitialised: (its name, parameters with siblings).

        Siblings are those of the block before (else behind) it; a gate's are its block's first convolution and norm.
        """
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
