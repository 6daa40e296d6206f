"""Sparsely gated experts beside an MLP, each computed only for the tokens that its gate takes.

    mlp(x) + Σ_e 1[e takes x]·σ(r_e·x)·E_e(x),   E_e(x) = P_e·gelu(F_e·x + f_e) + p_e

Expert e takes a token that no earlier expert took, where r_e·x + b_e > 0: in a shared softmax a new expert would
change the output. b_e steps towards the expert's share of tokens (2408.15664). `CAPACITY` bounds training only, so
that an evaluated token's output depends on no later token. N tokens, C embedding, W neurons.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.host_spec import ExpertSpec

CAPACITY = 1.5
BALANCE_STEP = 0.01  # of a score whose standard deviation is about 1


class Expert(nn.Module):
    """An MLP and its gate."""

    balance: Tensor

    def __init__(self, n_embd: int, shape: ExpertSpec) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(torch.empty(1, n_embd))
        self.c_fc = nn.Linear(n_embd, shape.width)
        self.c_proj = nn.Linear(shape.width, n_embd)
        start = NormalDist().inv_cdf(shape.share) if shape.share < 1 else math.inf  # newborn scores are about normal
        self.register_buffer("balance", torch.tensor(start, dtype=torch.float32))

    def forward(self, x: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, C); free: bool (N,), tokens not yet taken → (taken indices int64 (n,), output (n, C))."""
        scores = F.linear(x, self.router).squeeze(1)  # (N,)
        taken = self._choose(scores.detach().float() + self.balance, free)
        gate = scores[taken].sigmoid().unsqueeze(1)  # (n, 1)
        return taken, gate * self.c_proj(F.gelu(self.c_fc(x[taken]), approximate="tanh"))

    def outgoing(self) -> list[Tensor]:
        return [self.c_proj.weight, self.c_proj.bias]

    @torch.no_grad()
    def _choose(self, scores: Tensor, free: Tensor) -> Tensor:
        taken = ((scores > 0) & free).nonzero().squeeze(1)
        if not self.training:
            return taken
        share = self.shape.share
        if share < 1:
            self.balance += BALANCE_STEP * math.copysign(1.0, share - len(taken) / len(scores))
        capacity = math.ceil(CAPACITY * share * len(scores))
        if len(taken) > capacity:
            taken = taken[scores[taken].topk(capacity).indices.sort().values]
        return taken


class Experts(nn.ModuleDict):
    """A layer's experts by name, in the order in which they choose."""

    def all(self) -> Iterator[Expert]:
        return (expert for expert in self.values() if isinstance(expert, Expert))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, T, C), the MLP's input and output → y with the experts' outputs added."""
        if not len(self):
            return y
        flat, out = x.flatten(0, -2), y.flatten(0, -2)  # (N, C)
        free = torch.ones(len(flat), dtype=torch.bool, device=x.device)
        for expert in self.all():
            taken, added = expert(flat, free)
            out = out.index_add(0, taken, added.to(out.dtype))
            free[taken] = False
        return out.view_as(y)
