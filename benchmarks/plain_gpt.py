"""The baseline of the step benchmark: an ordinary GPT in nanoGPT's structure, and its training step."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Pre-norm causal self-attention with one fused QKV matrix, and MLP."""

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
    """Token and position embeddings, layers, tied head."""

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.Sequential(*(Layer(n_head, n_embd) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))

    def forward(self, idx: Tensor) -> Tensor:
        """idx: int64 (B, T) → logits (B, T, V)."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        return F.linear(self.ln_f(self.h(x)), self.wte.weight)


class PlainTrainer:
    """The usual loop: random windows of uint16 tokens, AdamW on two groups, clipping."""

    def __init__(self, model: PlainGPT, tokens, batch_size: int) -> None:
        self.model, self.tokens, self.batch_size = model, torch.from_numpy(tokens.astype("int64")), batch_size
        self.block_size = model.wpe.num_embeddings
        groups = [
            {"params": [p for p in model.parameters() if (p.dim() > 1) == matrix], "weight_decay": decay}
            for matrix, decay in ((True, 0.1), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(self) -> None:
        """One optimizer step."""
        starts = torch.randint(len(self.tokens) - self.block_size, (self.batch_size,)).tolist()
        batch = torch.stack([self.tokens[i : i + self.block_size + 1] for i in starts])  # (B, T + 1)
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
