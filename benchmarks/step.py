"""A step of a host that never grew, eager and compiled, of a plain model of its shape, of a loop with a Grower; of a
host that has grown, against one born that shape: while its six seeds are young, and after."""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RATE, Row, bound, in_turns, text, times, trainer
from nanogpt import GPT, GPTConfig
from torch import Tensor, nn

from esper import Budget, Grower
from esper.platform.host_spec import STAGES, HostSpec, ResNetSpec
from esper.platform.spec import RunSpec, load_spec
from esper.workers.tolaria.data import ImageData, TokenData, ensure, open_data
from esper.workers.tolaria.hosts import new_host
from esper.workers.tolaria.trainer import Trainer

LARGE = ["data.batch_size=2", "data.tokenizer=char", "dtype=float32", "device=cpu"]
SHAPES = {  # name → steps of a block, spec
    "demo": (60, load_spec("demo")),
    "tinystories-char, 1 layer": (60, load_spec("tinystories-char", ["host.n_layer=1"])),
    "tinystories-char, 4 layers": (30, load_spec("tinystories-char", ["host.n_layer=4"])),
    "tinystories, batch of 2": (5, load_spec("tinystories", LARGE)),
}
RESNET = {"kind": "resnet", "image_size": 8, "image_channels": 1}
RESNETS = {  # on scikit-learn's digits, which every machine has
    f"{blocks} blocks, C = {channels}": (
        steps,
        RunSpec.model_validate(
            {
                "host": {**RESNET, "n_layer": blocks, "channels": channels},
                "data": {"kind": "images"},
                "growth": {"max_layers": 8, "blueprints": {"conv_width": {}, "conv_block": {}}},
                "device": "cpu",
            }
        ),
    )
    for blocks, channels, steps in ((1, 8, 60), (3, 16, 40), (6, 32, 15))
}

GRAFTS = (("h0.ffn", "ffn"), ("h0.attention", "attention"), ("h0.stream", "block")) * 2
FOR_EVER = 10**9  # steps of probation


class Plain:
    """A model with the usual training step: AdamW on two groups, clipping."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        batch: Callable[[], tuple[Tensor, Tensor]],
        dtype: str = "float32",
    ) -> None:
        self.model, self.loss, self.batch, self.dtype = model, loss, batch, dtype
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
        groups = [{"params": matrices, "weight_decay": 0.1}, others]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    def step(self) -> None:
        inputs, targets = self.batch()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def windows(spec: RunSpec, data: TokenData, device: str = "cpu") -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes batches of random windows, as nanoGPT does."""
    length = spec.host.tokens + 1
    tokens = torch.from_numpy(data.windows("train", np.array([0]), min(data.manifest.counts["train"], 500_000))[0])

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - length + 1, (spec.data.batch_size,)).tolist()
        drawn = torch.stack([tokens[i : i + length] for i in starts])  # (B, T + 1)
        if device == "cuda":
            drawn = drawn.pin_memory().to(device, non_blocking=True)
        return drawn[:, :-1], drawn[:, 1:]

    return batch


def plain_gpt(spec: RunSpec, data: TokenData, device: str = "cpu") -> Plain:
    """nanoGPT's model and step, of the spec's shape."""
    host = spec.host
    assert isinstance(host, HostSpec)
    sizes = {name: getattr(host, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    model = GPT(GPTConfig(vocab_size=data.manifest.vocab_size, activation=nn.GELU("tanh"), **sizes)).to(device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * host.n_layer))
    return Plain(model, lambda idx, targets: model(idx, targets)[1], windows(spec, data, device), spec.dtype)


class OwnLoop:
    """A host in nanoGPT's loop, by itself or with a Grower that waits."""

    def __init__(self, spec: RunSpec, data: TokenData, *, watched: bool) -> None:
        self.host, self.batch = new_host(spec.host, data.manifest.vocab_size), windows(spec, data)
        self.optimizer = torch.optim.AdamW(self.host.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
        settings = {"budget": Budget(steps=10**9), "evaluate": lambda: 1.0}
        self.grower = Grower(self.host, self.optimizer, "static", **settings) if watched else None

    def step(self) -> None:
        idx, targets = self.batch()
        loss = F.cross_entropy(self.host(idx).flatten(0, 1), targets.flatten())
        loss.backward()
        if self.grower is not None:
            self.grower.step(loss)
            return
        nn.utils.clip_grad_norm_(self.host.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def normed(channels: int, outputs: int, group: int) -> list[nn.Module]:
    """Norm, relu, and a 3 × 3 convolution."""
    convolution = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
    return [nn.GroupNorm(channels // group, channels), nn.ReLU(), convolution]


class Residual(nn.Module):
    """An ordinary pre-activation block."""

    def __init__(self, channels: int, width: int, group: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*normed(channels, width, group), *normed(width, channels, group))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, S, S) → (B, C, S, S)."""
        return x + self.branch(x)


def plain_resnet(spec: RunSpec, data: ImageData) -> Plain:
    """Pre-activation blocks in three stages, with GroupNorm, as torch's own modules in a row."""
    host = spec.host
    assert isinstance(host, ResNetSpec)
    parts, blocks = [], host.alike(host.n_layer, host.own_width, 1)
    parts.append(nn.Conv2d(host.image_channels, host.channels, 3, padding=1, bias=False))
    for stage in range(STAGES):
        C = host.channels << stage
        parts += [nn.AvgPool2d(2), nn.Conv2d(C // 2, C, 1, bias=False)] if stage else []
        parts += [Residual(C, layer.width, host.group) for layer in blocks if layer.stage == stage]
    last = [nn.GroupNorm(C // host.group, C), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*parts, *last, nn.Linear(C, data.manifest.classes))
    images, labels = data.examples("train", np.arange(data.manifest.counts["train"]), torch.device("cpu"))

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (spec.data.batch_size,))
        return images[rows].contiguous(memory_format=torch.channels_last), labels[rows]  # as the host's

    return Plain(model, lambda x, targets: F.cross_entropy(model(x), targets), batch)


def step() -> list[Row]:
    """Rows: three a shape of a GPT, one a shape of a ResNet."""
    rows = []
    for name, (steps, spec) in SHAPES.items():
        data = text(spec)
        ours, fast, plain = trainer(spec, data), bound(trainer(spec, data)), plain_gpt(spec, data)
        loops = {"watched": OwnLoop(spec, data, watched=True).step, "bare": OwnLoop(spec, data, watched=False).step}
        works = {"ours": ours.step, "fast": fast.step}
        works = {name: lambda step=step: step(RATE) for name, step in works.items()}
        seconds = in_turns({**works, "plain": plain.step, **loops}, steps)
        rows.append((f"training step against nanoGPT's: {name}", "≤ 1.00 ×", times(seconds["ours"], seconds["plain"])))
        rows.append((f"compiled step against eager: {name}", "< 1.00 ×", times(seconds["fast"], seconds["ours"])))
        row = f"step of a loop with a Grower against one without: {name}"
        rows.append((row, "≤ 1.02 ×", times(seconds["watched"], seconds["bare"])))
    for name, (steps, spec) in RESNETS.items():
        images = open_data(ensure(spec.data))
        assert isinstance(images, ImageData)
        ours, plain = trainer(spec, images), plain_resnet(spec, images)
        seconds = in_turns({"ours": lambda step=ours.step: step(RATE), "plain": plain.step}, steps)
        row = f"training step against a plain ResNet's: {name}"
        rows.append((row, "≤ 1.03 ×", times(seconds["ours"], seconds["plain"])))
    return rows


def contenders(spec: RunSpec, data: TokenData) -> dict[str, Trainer]:
    """Three hosts of one shape: born so, grown with its seeds on probation, grown with its seeds settled."""
    growth = spec.growth.model_copy(update={"probation_steps": FOR_EVER, "max_layers": spec.host.n_layer + 2})
    young, born = (trainer(spec.model_copy(update={"growth": growth}), data) for _ in range(2))
    for site, blueprint in GRAFTS:
        young.kasmina.graft(site, blueprint)
    settled = copy.deepcopy(young)
    for seed in settled.kasmina.seeds:
        seed.probation = seed.settled = 1
    settled.step(RATE)
    shape = young.host.shape
    assert isinstance(spec.host, HostSpec)
    host = spec.host.model_copy(update={"n_layer": shape.depth(), "layers": shape.layers})
    born.take(new_host(host, shape.vocab_size))
    return {"born": born, "on probation": young, "settled": settled}


def grown_rows(spec: RunSpec, steps: int, what: str) -> Iterator[Row]:
    """Of a spec: a row a stage."""
    trainers = contenders(spec, text(spec))
    seconds = in_turns({stage: lambda each=each: each.step(RATE) for stage, each in trainers.items()}, steps)
    for stage, goal in (("on probation", "≤ 1.05 ×"), ("settled", "≤ 1.02 ×")):
        told = f"step with {len(GRAFTS)} seeds {stage} against born that shape{what}"
        yield told, goal, times(seconds[stage], seconds["born"])


def growth() -> list[Row]:
    """Rows: a shape and stage each."""
    return [row for name, (steps, spec) in list(SHAPES.items())[:2] for row in grown_rows(spec, steps, f": {name}")]
