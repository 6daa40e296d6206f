"""A ResNet's shape without its tensors: sites, parameters and FLOPs in closed form.

C channels of the first stage's stream, doubled in each stage that follows; W hidden channels of a block; R neurons of
its channel attention; V classes. Convolutions are 3×3 and have no bias, as a norm or the stream comes after them.
"""

from dataclasses import dataclass
from typing import Self

from esper.platform.contracts import InjectionSpec
from esper.platform.errors import UserError
from esper.platform.host_spec import STAGES, BlockSpec, ResNetSpec
from esper.workers.kasmina.registry import names_for
from esper.workers.tolaria.model.layered import LayeredShape

TAPS = 9  # weights of a 3×3 convolution for each pair of channels


@dataclass(frozen=True)
class ResNetShape(LayeredShape):
    """A whole ResNet's shape.

    Sites: `s<n>.stream` where stage n begins, then `h<uid>.conv`, `h<uid>.stream` per block; uids are never used again.
    """

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

    def attention_parameters(self) -> int:
        return 0

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
        c, r = self.stream(layer.stage), layer.gate
        return 2 * TAPS * c * layer.width + 2 * c + 2 * layer.width + (2 * c * r + r + c if r else 0)
