"""Metrics of an iteration's episodes and of the update on them. N decisions in all, A candidates."""

from collections.abc import Sequence

import numpy as np
import torch

from esper.platform.telemetry import CANDIDATE, GROWTH_KINDS, OPERATIONS
from esper.policies.simic.episode import Played
from esper.policies.simic.net import ControllerNet, divergence, entropy


def stacked(episodes: Sequence[Played], name: str) -> np.ndarray:
    """An array (K, …) of each episode, as one (N, …)."""
    return np.concatenate([getattr(each, name) for each in episodes])


def sample_metrics(episodes: Sequence[Played], said: np.ndarray, weights_seq_no: int) -> dict[str, float]:
    """Metrics before the update; `said`: the rewards to come as baseline and value predicted them, nats (N,)."""
    returns = [each.to_come[0] for each in episodes]
    seconds = [each.worked.sum() for each in episodes]
    lag = np.maximum(0, weights_seq_no - stacked(episodes, "weights"))  # a resumed training's may be newer
    metrics = {
        "episodes": len(episodes),
        "decisions": len(lag),
        "episode_length": np.mean([len(each) for each in episodes]),
        "return_mean": np.mean(returns),
        "return_min": np.min(returns),
        "return_max": np.max(returns),
        "explained_variance": _explained_variance(episodes, said),
        "entropy": entropy(torch.from_numpy(stacked(episodes, "logits"))).mean(),
        "lag_mean": lag.mean(),
        "lag_max": lag.max(),
        "episode_seconds": np.mean(seconds),
        "episode_seconds_max": np.max(seconds),
        **_action_shares(episodes),
    }
    losses = [each.final_loss for each in episodes if each.final_loss is not None]
    if losses:
        metrics["val_loss"] = np.mean(losses)
    return {name: float(value) for name, value in metrics.items()}


def _explained_variance(episodes: Sequence[Played], said: np.ndarray) -> float:
    """1 − Var[G − V] / Var[G | k], at least −1: G the rewards to come at decision k, V their prediction.

    Stricter than RLlib's: before the update, and less each decision's mean, the fall of the loss itself.
    """
    decision, to_come = np.concatenate([np.arange(len(each)) for each in episodes]), stacked(episodes, "to_come")
    means = np.bincount(decision, to_come) / np.bincount(decision)
    variance = ((to_come - means[decision]) ** 2).mean()
    return float(max(-1.0, 1 - (to_come - said).var() / variance)) if variance > 0 else 0.0


def _action_shares(episodes: Sequence[Played]) -> dict[str, float]:
    """Fraction of the decisions by operation, and by what a graft adds: `wait`, `graft`, `prune`, `heads` …"""
    chosen = np.concatenate([each.observations["candidates"][np.arange(len(each)), each.actions] for each in episodes])
    grafts = chosen[:, CANDIDATE.index("is_graft")]
    shares = {name: chosen[:, CANDIDATE.index(f"is_{name}")].mean() for name in OPERATIONS}
    return shares | {kind: (grafts * chosen[:, CANDIDATE.index(f"adds_{kind}")]).mean() for kind in GROWTH_KINDS}


def decided_on(episodes: Sequence[Played]) -> dict[str, torch.Tensor]:
    """The observations that decisions were taken on, float32 (N, …) by name."""
    seen = [each.observations for each in episodes]
    return {name: torch.from_numpy(np.concatenate([each[name][:-1] for each in seen])) for name in seen[0]}


def update_metrics(
    episodes: Sequence[Played], net: ControllerNet, clip: float, anchor: np.ndarray | None = None
) -> dict[str, float]:
    """`clip_fraction`: decisions with p_new/p_old outside 1 ± clip; `kl`: mean of Σ p_old ln(p_old/p_new), nats.

    And by an anchor's logits, float32 (N, A), `anchor_kl`: mean of Σ p_new ln(p_new/p_anchor), nats.
    """
    before = torch.from_numpy(stacked(episodes, "logits"))
    with torch.no_grad():
        after = net.logits(decided_on(episodes))
    actions = torch.from_numpy(stacked(episodes, "actions")).unsqueeze(-1)
    ratio = (after.log_softmax(dim=-1) - before.log_softmax(dim=-1)).gather(-1, actions).exp()
    metrics = {
        "clip_fraction": float(((ratio - 1).abs() > clip).float().mean()),
        "kl": float(divergence(before, after).mean()),
    }
    if anchor is not None:
        metrics["anchor_kl"] = float(divergence(after, torch.from_numpy(anchor)).mean())
    return metrics
