"""ControllerNet: scores candidate rows, and a value. Pure torch. B batch, S sites, A candidates, H hidden.

A set encoder as in Deep Sets (Zaheer et al. 2017, 1703.06114): new blueprints, sites or hosts add rows, not outputs.
Orthogonal initialisation, gains √2, value 1, policy 0.01 (Huang et al. 2022, "37 Implementation Details of PPO", 2).
Value and policy share no trunk (Andrychowicz et al. 2020, 2006.05990, §3.2): the value's regression would shape it.
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.platform.telemetry import CANDIDATE, GLOBALS, HIDDEN, SITE

ILLEGAL = -1e9  # a logit; finite, so that entropy and KL stay finite: exp(−1e9) is exactly 0 and 0 · 1e9 is 0
WAIT_PRIOR = 0.7  # 24 decisions then hold some 7 grafts; most decisions of a good schedule are WAIT

SCALES = {"parameters": 5.0, "seconds": 5.0} | dict.fromkeys(HIDDEN, 0.0)  # else lost in LayerNorm; 0 hides

_SITE_PRESENT = SITE.index("present")
_IS_WAIT = CANDIDATE.index("is_wait")


class ControllerNet(nn.Module):
    """Scores each candidate on its row, the pooled sites and globals; illegal rows get ILLEGAL.

    Inputs: `globals` (B, G), `sites` (B, S, F), `candidates` (B, A, Fc) float32, `mask` (B, A) bool or float32.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.globals = Scaled(GLOBALS)
        self.policy_sites = SitePool(hidden)
        self.policy_context = _encoder(len(GLOBALS) + 2 * hidden, hidden)
        self.candidate = nn.Sequential(Scaled(CANDIDATE), _encoder(len(CANDIDATE), hidden))
        self.score = nn.Sequential(  # of [row, context]
            _linear(2 * hidden, hidden),
            nn.GELU(),
            _linear(hidden, 1, gain=0.01, bias=False),  # a bias, equal for all rows, would change no probability
        )
        self.value_sites = SitePool(hidden)
        self.value_head = nn.Sequential(
            _encoder(len(GLOBALS) + 2 * hidden, hidden),
            _linear(hidden, hidden),
            nn.GELU(),
            _linear(hidden, 1, gain=1.0),
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits float32 (B, A) and values float32 (B,)."""
        return self.logits(inputs), self.value(inputs)

    @torch.inference_mode()
    def choose(self, inputs: Mapping[str, np.ndarray], uniform: np.ndarray) -> tuple[np.ndarray, ...]:
        """Legal rows int64 (B,) by inverse distribution from `uniform` (B,); logits (B, A), ln p (B,), values (B,)."""
        dtype = cast(Tensor, self.score[0].weight).dtype
        outputs, values = self({name: torch.from_numpy(array).to(dtype) for name, array in inputs.items()})
        logits = outputs.float().numpy()
        scores = logits.astype(np.float64)
        chances = np.exp(scores - scores.max(axis=-1, keepdims=True)).cumsum(axis=-1)  # exactly 0 on illegal rows
        actions = (chances > uniform[:, None] * chances[:, -1:]).argmax(axis=-1)
        log_p = outputs.log_softmax(dim=-1).float().numpy()[np.arange(len(actions)), actions]
        return actions, logits, log_p, values.numpy()

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits float32 (B, A); WAIT's is raised by ln n + ln(p / (1 − p)), n the other legal rows.

        At equal scores WAIT then has probability p = WAIT_PRIOR for any n: new sites do not shift whether to act.
        """
        candidates, legal = inputs["candidates"], inputs["mask"] > 0.5
        parts = [self.globals(inputs["globals"]), self.policy_sites(inputs["sites"])]
        context = torch.cat(parts, dim=-1)  # (B, G + 2H)
        of, row = legal.nonzero(as_tuple=True)  # N legal rows; the others, mostly padding, are not computed
        joint, activation, last = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(self.score))
        of_row, of_context = joint.weight.split(self.hidden, dim=1)
        context = functional.linear(self.policy_context(context), of_context, joint.bias)  # (B, H)
        hidden = functional.linear(self.candidate(candidates[of, row]), of_row) + context[of]  # (N, H)
        scores = last(activation(hidden)).squeeze(-1)  # (N,)
        wait = candidates[..., _IS_WAIT]  # (B, A), 1 on WAIT's row
        others = (legal * (1 - wait)).sum(dim=-1, keepdim=True)  # (B, 1)
        prior = others.clamp(min=1).log() + math.log(WAIT_PRIOR / (1 - WAIT_PRIOR))
        logits = torch.full_like(wait, ILLEGAL).index_put((of, row), scores)
        return torch.where(legal, logits + wait * prior, ILLEGAL)

    def value(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Expected sum of the shaped rewards (`baseline.py`) still to come, float32 (B,)."""
        pooled = self.value_sites(inputs["sites"])  # (B, 2H)
        return self.value_head(torch.cat([self.globals(inputs["globals"]), pooled], dim=-1)).squeeze(-1)


class SitePool(nn.Module):
    """Site rows as one vector: encoder, then mean and max over the present rows; zeros without any."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Scaled(SITE), _encoder(len(SITE), hidden), _linear(hidden, hidden), nn.GELU())

    def forward(self, sites: Tensor) -> Tensor:
        """float32 (B, S, F) → (B, 2H)."""
        present = sites[..., _SITE_PRESENT : _SITE_PRESENT + 1] > 0.5  # (B, S, 1)
        rows = self.encoder(sites)  # (B, S, H)
        count = present.sum(dim=1)  # (B, 1)
        mean = (rows * present).sum(dim=1) / count.clamp(min=1)
        largest = rows.masked_fill(~present, -math.inf).amax(dim=1)
        return torch.cat([mean, torch.where(count > 0, largest, 0.0)], dim=-1)


class Scaled(nn.Module):
    """Rows times their columns' `SCALES`. No weights."""

    scales: Tensor

    def __init__(self, columns: tuple[str, ...]) -> None:
        super().__init__()
        scales = [SCALES.get(name.removeprefix("site_"), 1.0) for name in columns]
        self.register_buffer("scales", torch.tensor(scales), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.scales


def _encoder(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(_linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU())


def _linear(inputs: int, outputs: int, gain: float = math.sqrt(2), bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.orthogonal_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's choice in nats: float32 (B, A) → (B,)."""
    log_p = functional.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(p ‖ q) of each row's choices in nats, Σ p ln(p/q): float32 (B, A), (B, A) → (B,)."""
    log_p = functional.log_softmax(logits, dim=-1)
    return (log_p.exp() * (log_p - functional.log_softmax(others, dim=-1))).sum(dim=-1)
