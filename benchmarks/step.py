"""A training step of a host that never grew, eager and compiled, and a plain GPT of its shape with nanoGPT's step."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from measuring import RATE, Row, bound, in_turns, text, times, trainer
from torch import Tensor, nn

from esper.platform.spec import RunSpec, load_spec
from esper.workers.tolaria.data import TokenData

LARGE = ["data.batch_size=2", "data.tokenizer=char", "dtype=float32", "device=cpu"]
SHAPES = {  # name → steps of a block, spec
    "demo": (60, load_spec("demo")),
    "tinystories-char, 1 layer": (60, load_spec("tinystories-char", ["host.n_layer=1"])),
    "tinystories-char, 4 layers": (30, load_spec("tinystories-char", ["host.n_layer=4"])),
    "tinystories, batch of 2": (5, load_spec("tinystories", LARGE)),
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


class PlainGPT(nn.Module):
    """Token and position embeddings, layers, tied head; and the usual training step: AdamW on two groups, clipping."""

    def __init__(self, spec: RunSpec, data: TokenData, device: str = "cpu") -> None:
        super().__init__()
        host, self.batch_size, self.autocast = spec.host, spec.data.batch_size, spec.dtype == "bfloat16"
        vocab_size, C = data.manifest.vocab_size, host.n_embd
        self.wte, self.wpe = nn.Embedding(vocab_size, C), nn.Embedding(host.block_size, C)
        self.h = nn.Sequential(*(Layer(host.n_head, C) for _ in range(host.n_layer)))
        self.ln_f = nn.LayerNorm(C)
        self.to(device)
        matrices = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        for matrix in matrices:
            nn.init.normal_(matrix, std=0.02 / math.sqrt(2 * host.n_layer))
        others = {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0}
        groups = [{"params": matrices, "weight_decay": 0.1}, others]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
        windows = data.windows("train", np.array([0]), min(data.tokens("train"), 500_000))[0]
        self.tokens = torch.from_numpy(windows.astype("int64"))  # (N,)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets: int64 (B, T) → mean loss in nats."""
        with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
            logits = F.linear(self.ln_f(self.h(x)), self.wte.weight).float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(self) -> None:
        """One optimizer step on random windows."""
        length, device = self.wpe.num_embeddings + 1, self.wpe.weight.device
        starts = torch.randint(len(self.tokens) - length + 1, (self.batch_size,)).tolist()
        batch = torch.stack([self.tokens[i : i + length] for i in starts])  # (B, T + 1)
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        self(batch[:, :-1], batch[:, 1:]).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()


def measure() -> list[Row]:
    """Rows: two a shape."""
    rows = []
    for name, (steps, spec) in SHAPES.items():
        data = text(spec)
        ours, fast, plain = trainer(spec, data), bound(trainer(spec, data)), PlainGPT(spec, data)
        works = {"ours": ours.step, "fast": fast.step}
        works = {name: lambda step=step: step(RATE) for name, step in works.items()}
        seconds = in_turns({**works, "plain": plain.step}, steps)
        rows.append((f"training step against nanoGPT's: {name}", "≤ 1.00 ×", times(seconds["ours"], seconds["plain"])))
        rows.append((f"compiled step against eager: {name}", "< 1.00 ×", times(seconds["fast"], seconds["ours"])))
    return rows
