"""`make bench` (or `python benchmarks/run.py step growth dispatch`): paired ratios, and the dispatcher's speed."""

import copy
import math
import platform as host_platform
import statistics
import sys
import time
from collections.abc import Callable

import dispatch
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import Instance
from esper.platform.spec import DataSpec, load_spec
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.tolaria.data import TokenData, ensure
from esper.workers.tolaria.model.transformer import TransformerHost
from esper.workers.tolaria.trainer import Trainer

LARGE = ["data.batch_size=2", "data.tokenizer=char", "dtype=float32", "device=cpu"]
SHAPES = {  # name → steps of a block, spec
    "demo": (60, load_spec("demo")),
    "tinystories-char, 1 layer": (60, load_spec("tinystories-char", ["host.n_layer=1"])),
    "tinystories-char, 4 layers": (30, load_spec("tinystories-char", ["host.n_layer=4"])),
    "tinystories (batch 2)": (5, load_spec("tinystories", LARGE)),
}
GRAFTS = (("h0.ffn", "ffn"), ("h0.attention", "attention"), ("h0.stream", "block"))
BURN_IN = 3
BLOCKS = 7  # paired blocks, each a few steps of the one, then of the other
RATE = 1e-4


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

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.Sequential(*(Layer(n_head, n_embd) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        matrices = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        for matrix in matrices:
            nn.init.normal_(matrix, std=0.02 / math.sqrt(2 * n_layer))
        others = {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0}
        groups = [{"params": matrices, "weight_decay": 0.1}, others]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    def forward(self, idx: Tensor) -> Tensor:
        """idx: int64 (B, T) → logits (B, T, V)."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        return F.linear(self.ln_f(self.h(x)), self.wte.weight)

    def step(self, tokens: Tensor, batch_size: int) -> None:
        """One optimizer step on random windows of tokens, int64 (N,)."""
        length = self.wpe.num_embeddings + 1
        starts = torch.randint(len(tokens) - length + 1, (batch_size,)).tolist()
        batch = torch.stack([tokens[i : i + length] for i in starts])  # (B, T + 1)
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()


def paired(a: Callable[[], object], b: Callable[[], object], steps: int) -> str:
    """Seconds of b over seconds of a, above 1 where a is faster: median and range over paired blocks.

    The range of 7 blocks covers the true median with 98 % (sign test, 1 − 2·½⁷).
    """
    ratios = []
    for block in range(-1, BLOCKS):  # the first burns in
        taken = {}
        for work in (a, b) if block % 2 else (b, a):
            begun = time.perf_counter()
            for _ in range(BURN_IN if block < 0 else steps):
                work()
            taken[work] = time.perf_counter() - begun
        ratios.append(taken[b] / taken[a])
    ratios = ratios[1:]
    return f"{statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f}, {BLOCKS} paired blocks)"


def bench_step(data: TokenData) -> None:
    """A training step of a growable host, never grown, against a plain GPT of the same shape."""
    print("training step, speed of ours over a plain GPT of the same shape (goal: 0.98x or more)")
    windows = data.windows("train", np.array([0]), min(data.tokens("train"), 500_000))[0]
    tokens = torch.from_numpy(windows.astype("int64"))
    for name, (steps, spec) in SHAPES.items():
        ours, host = Trainer(spec, data, make_blueprints(), 0, Instance()), spec.host
        plain = PlainGPT(data.manifest.vocab_size, host.block_size, host.n_layer, host.n_head, host.n_embd)
        ratio = paired(
            lambda ours=ours: ours.step(RATE),
            lambda plain=plain, size=spec.data.batch_size: plain.step(tokens, size),
            steps,
        )
        print(f"  {name:<28} {ratio}")


def bench_growth(data: TokenData) -> None:
    """A step of a host grown by a seed of each kind, on probation and fused, against one born that shape."""
    print("training step, speed of a grown host over one born that shape (goals: fused 0.98x, on probation 0.93x)")
    for name, (steps, spec) in list(SHAPES.items())[:3]:
        blueprints = make_blueprints(spec.growth.blueprints)
        young, born = (Trainer(spec, data, blueprints, 0, Instance()) for _ in range(2))
        for site, blueprint in GRAFTS:
            young.kasmina.graft(site, blueprint)
        fused = copy.deepcopy(young)
        for seed in list(fused.kasmina.seeds):
            fused.kasmina.fuse(seed)
        for seed in young.kasmina.seeds:  # for as long as the benchmark takes
            seed.probation = seed.fuse_age = 10**9
        shape = young.host.shape
        host = spec.host.model_copy(update={"n_layer": shape.depth(), "layers": shape.layers})
        born.take(TransformerHost(host, shape.vocab_size))
        for stage, grown in (("fused", fused), ("on probation", young)):
            ratio = paired(lambda grown=grown: grown.step(RATE), lambda born=born: born.step(RATE), steps)
            print(f"  {name:<28} {stage:<13} {ratio}")
            grown.forget()
            born.forget()


def bench_dispatch(data: TokenData) -> None:
    """What a dispatcher can serve, and how soon; without Ray's own share."""
    for what, goal, value in dispatch.measure():
        print(f"  {what:<70} {goal:<10} {value}")


BENCHMARKS = {"step": bench_step, "growth": bench_growth, "dispatch": bench_dispatch}

if __name__ == "__main__":
    print(f"{host_platform.processor() or host_platform.machine()}, torch {torch.__version__}, 1 thread")
    torch.set_num_threads(1)
    text = TokenData.open(ensure(DataSpec(source="python-docs")))
    for chosen in sys.argv[1:] or BENCHMARKS:
        BENCHMARKS[chosen](text)
