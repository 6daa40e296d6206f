"""Sparsely gated experts beside an MLP, each computed only for the tokens that its gate takes.

    mlp(x) + Σ_e 1[e takes x]·σ(r_e·x)·E_e(x),   E_e(x) = P_e·gelu(F_e·x + f_e) + p_e

Each expert has a gate of its own and takes tokens that no earlier expert has taken: in a softmax shared by all, a new
expert would take tokens from the old ones and so change the output. A token is taken where r_e·x + b_e > 0; the gate's
value multiplies the output, so the router learns. b_e is no parameter: it moves by a fixed step towards the state in
which the expert takes its share of the tokens (balance without an auxiliary loss: 2408.15664). In training an expert
takes at most `CAPACITY` times its share of a batch's tokens, those with the highest scores; in evaluation there is no
bound, so that a token's output depends on no later one.

N tokens, C embedding, W neurons of an expert.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.spec import ExpertSpec

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
        # Scores are about standard normal at birth: the bias at which a share of them is above 0.
        start = NormalDist().inv_cdf(shape.share) if shape.share < 1 else math.inf
        self.register_buffer("balance", torch.tensor(start, dtype=torch.float32))

    def forward(self, x: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, C); free: bool (N,), tokens not yet taken → (indices int64 (n,) of the taken ones, output (n, C))."""
        scores = F.linear(x, self.router).squeeze(1)  # (N,)
        taken = self._choose(scores.detach().float() + self.balance, free)
        gate = scores[taken].sigmoid().unsqueeze(1)  # (n, 1)
        return taken, gate * self.c_proj(F.gelu(self.c_fc(x[taken]), approximate="tanh"))

    def outgoing(self) -> list[Tensor]:
        """Every tensor through which the expert writes to the stream."""
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
    """The experts of a layer, by name, in the order in which they choose."""

    def all(self) -> Iterator["Expert"]:
        """Them, in that order."""
        for expert in self.values():
            assert isinstance(expert, Expert)
            yield expert

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, T, C), the MLP's input and output → y with the experts' outputs added."""
        flat, out = x.flatten(0, -2), y.flatten(0, -2)  # (N, C)
        free = torch.ones(len(flat), dtype=torch.bool, device=x.device)
        for expert in self.all():
            taken, added = expert(flat, free)
            out = out.index_add(0, taken, added.to(out.dtype))
            free[taken] = False
        return out.view_as(y)
