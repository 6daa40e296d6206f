"""A step of a host that never grew, eager and compiled; of a plain model of its shape; of a loop with a Grower."""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RATE, Row, bound, in_turns, text, times, trainer
from torch import Tensor, nn

from esper import Budget, Grower
from esper.platform.host_spec import STAGES, HostSpec, ResNetSpec
from esper.platform.spec import RunSpec, load_spec
from esper.workers.tolaria.data import ImageData, TokenData, ensure, open_data
from esper.workers.tolaria.hosts import new_host

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


class Layer(nn.Module):
    """Of an ordinary GPT in nanoGPT's structure: pre-norm causal self-attention with one fused QKV matrix, and MLP."""

    def __init__(self, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.c_out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.c_fc, self.c_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        B, T, C = x.shape
        heads = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(*heads, is_causal=True)  # (B, H, T, D)
        x = x + self.c_out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Plain(nn.Module, ABC):
    """A model with the usual training step: AdamW on two groups, clipping."""

    def prepare(self, device: str) -> None:
        """Move to the device, and make the optimizer."""
        self.to(device)
        matrices = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        others = {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0}
        groups = [{"params": matrices, "weight_decay": 0.1}, others]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    @abstractmethod
    def batch(self) -> tuple[Tensor, Tensor]:
        """Random inputs and targets."""

    def step(self) -> None:
        """One optimizer step."""
        batch = self.batch()
        self.optimizer.zero_grad(set_to_none=True)
        self(*batch).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()


class PlainGPT(Plain):
    """Token and position embeddings, layers, tied head."""

    def __init__(self, spec: RunSpec, data: TokenData, device: str = "cpu") -> None:
        super().__init__()
        host, self.batch_size, self.autocast = spec.host, spec.data.batch_size, spec.dtype == "bfloat16"
        assert isinstance(host, HostSpec)
        vocab_size, C = data.manifest.vocab_size, host.n_embd
        self.wte, self.wpe = nn.Embedding(vocab_size, C), nn.Embedding(host.block_size, C)
        self.h = nn.Sequential(*(Layer(host.n_head, C) for _ in range(host.n_layer)))
        self.ln_f = nn.LayerNorm(C)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * host.n_layer))
        self.prepare(device)
        windows = data.windows("train", np.array([0]), min(data.manifest.counts["train"], 500_000))[0]
        self.tokens = torch.from_numpy(windows.astype("int64"))  # (N,)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets: int64 (B, T) → mean loss in nats."""
        with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
            logits = F.linear(self.ln_f(self.h(x)), self.wte.weight).float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random windows."""
        length, device = self.wpe.num_embeddings + 1, self.wpe.weight.device
        starts = torch.randint(len(self.tokens) - length + 1, (self.batch_size,)).tolist()
        batch = torch.stack([self.tokens[i : i + length] for i in starts])  # (B, T + 1)
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


class OwnLoop(PlainGPT):
    """A host in nanoGPT's loop, by itself or with a Grower that waits."""

    def __init__(self, spec: RunSpec, data: TokenData, *, watched: bool) -> None:
        super().__init__(spec, data)
        self.host = new_host(spec.host, data.manifest.vocab_size)
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


class PlainResNet(Plain):
    """Pre-activation blocks in three stages, with GroupNorm, as torch's own modules in a row."""

    def __init__(self, spec: RunSpec, data: ImageData) -> None:
        super().__init__()
        host, self.batch_size = spec.host, spec.data.batch_size
        assert isinstance(host, ResNetSpec)
        self.stem = nn.Conv2d(host.image_channels, host.channels, 3, padding=1, bias=False)
        parts = []
        for stage in range(STAGES):
            C = host.channels << stage
            parts += [nn.AvgPool2d(2), nn.Conv2d(C // 2, C, 1, bias=False)] if stage else []
            blocks = [layer for layer in host.alike(host.n_layer, host.own_width, 1) if layer.stage == stage]
            parts += [Residual(C, layer.width, host.group) for layer in blocks]
        self.parts, self.norm = nn.Sequential(*parts), nn.GroupNorm(C // host.group, C)
        self.head = nn.Linear(C, data.manifest.classes)
        self.prepare("cpu")
        self.images, self.labels = data.examples("train", np.arange(data.manifest.counts["train"]), torch.device("cpu"))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: (B, channels, S, S), labels: int64 (B,) → mean loss in nats."""
        images = images.contiguous(memory_format=torch.channels_last)  # as the host's
        x = F.relu(self.norm(self.parts(self.stem(images))))
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random images."""
        rows = torch.randint(len(self.images), (self.batch_size,))
        return self.images[rows], self.labels[rows]


class Residual(nn.Module):
    """An ordinary pre-activation block."""

    def __init__(self, channels: int, width: int, group: int) -> None:
        super().__init__()
        first = nn.GroupNorm(channels // group, channels), nn.ReLU(), nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        second = nn.GroupNorm(width // group, width), nn.ReLU(), nn.Conv2d(width, channels, 3, 1, 1, bias=False)
        self.branch = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, S, S) → (B, C, S, S)."""
        return x + self.branch(x)


def measure() -> list[Row]:
    """Rows: three a shape of a GPT, one a shape of a ResNet."""
    rows = []
    for name, (steps, spec) in SHAPES.items():
        data = text(spec)
        ours, fast, plain = trainer(spec, data), bound(trainer(spec, data)), PlainGPT(spec, data)
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
        ours, plain = trainer(spec, images), PlainResNet(spec, images)
        seconds = in_turns({"ours": lambda step=ours.step: step(RATE), "plain": plain.step}, steps)
        row = f"training step against a plain ResNet's: {name}"
        rows.append((row, "≤ 1.03 ×", times(seconds["ours"], seconds["plain"])))
    return rows
