"""The baseline of the step benchmark: an ordinary, ungrowable GPT in nanoGPT's structure, and its training step."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainConfig:
    """GPT-2's usual settings."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int


class Attention(nn.Module):
    """Causal self-attention with one fused QKV matrix, [Q; K; V]."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Layer(nn.Module):
    """Attention and MLP."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) → (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """Token and position embeddings, layers, tied head."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx: Tensor) -> Tensor:
        """idx: int64 (B, T) → logits (B, T, V)."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


class PlainTrainer:
    """The usual loop: random windows, AdamW on two groups, clipping."""

    def __init__(self, config: PlainConfig, tokens, batch_size: int) -> None:
        self.model = PlainGPT(config)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-4,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.tokens, self.batch_size, self.block_size = tokens, batch_size, config.block_size

    def step(self) -> None:
        """One optimizer step."""
        starts = torch.randint(len(self.tokens) - self.block_size, (self.batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(self.tokens[i : i + self.block_size].astype("int64")) for i in starts])
        y = torch.stack(
            [torch.from_numpy(self.tokens[i + 1 : i + 1 + self.block_size].astype("int64")) for i in starts]
        )
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(x)
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
