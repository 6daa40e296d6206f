"""Metrics of an iteration's episodes and of the update on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from esper.platform.telemetry import CANDIDATE, GROWTH_KINDS, OPERATIONS
from esper.policies.simic.net import ControllerNet, entropy


@dataclass(frozen=True)
class Sample:
    """Whole episodes, decision by decision: N in all."""

    lengths: list[int]  # decisions of each episode
    observations: dict[str, np.ndarray]  # float32 (N, …) by name
    actions: np.ndarray  # int64 (N,)
    logits: np.ndarray  # float32 (N, A), which chose them
    values: np.ndarray  # float32 (N,), as said by the same network
    weights: np.ndarray  # int64 (N,), its number
    to_come: np.ndarray  # float64 (N,), true rewards still to come, in nats
    infos: list[dict[str, Any]]  # of every decision's outcome

    @classmethod
    def of(cls, episodes: Sequence[SingleAgentEpisode]) -> "Sample":
        """Copies of numpy'ised episodes, which RLlib changes."""
        observations = [episode.get_observations(slice(0, len(episode))) for episode in episodes]

        def stacked(column: str) -> np.ndarray:
            return np.concatenate([episode.get_extra_model_outputs(column) for episode in episodes])

        return cls(
            [len(episode) for episode in episodes],
            {name: np.concatenate([each[name] for each in observations]) for name in observations[0]},
            np.concatenate([episode.get_actions() for episode in episodes]),
            stacked(Columns.ACTION_DIST_INPUTS),
            stacked(Columns.VF_PREDS),
            stacked(WEIGHTS_SEQ_NO),
            np.concatenate([np.cumsum(episode.get_rewards()[::-1])[::-1] for episode in episodes]),
            [info for episode in episodes for info in episode.get_infos()[1:]],
        )

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """An array (N, …) by episode."""
        return np.split(array, np.cumsum(self.lengths)[:-1])


def sample_metrics(sample: Sample, said: np.ndarray, weights_seq_no: int) -> dict[str, float]:
    """Metrics before the update; `said`: what baseline and value then predicted of `to_come`, nats (N,)."""
    returns = [each[0] for each in sample.split(sample.to_come)]
    lag = np.maximum(0, weights_seq_no - sample.weights)  # a resumed training may meet weights after its checkpoint's
    spent = [each.sum() for each in sample.split(np.array([info.get("worked", 0.0) for info in sample.infos]))]
    metrics = {
        "episodes": len(sample.lengths),
        "decisions": len(sample.actions),
        "episode_length": np.mean(sample.lengths),
        "return_mean": np.mean(returns),
        "return_min": np.min(returns),
        "return_max": np.max(returns),
        "explained_variance": explained_variance(sample, said),
        "entropy": entropy(torch.from_numpy(sample.logits)).mean(),
        "lag_mean": lag.mean(),
        "lag_max": lag.max(),
        "episode_seconds": np.mean(spent),
        "episode_seconds_max": np.max(spent),
        **action_shares(sample),
    }
    losses = [info["val_loss"] for info in sample.infos if info.get("val_loss") is not None]
    if losses:
        metrics["val_loss"] = np.mean(losses)
    return {name: float(value) for name, value in metrics.items()}


def explained_variance(sample: Sample, said: np.ndarray) -> float:
    """1 − Var[G − V] / Var[G | k], at least −1: G the rewards to come at decision k, V their prediction.

    Stricter than RLlib's: before the update, and less each decision's mean, the fall of the loss itself.
    """
    decision = np.concatenate([np.arange(length) for length in sample.lengths])
    means = np.bincount(decision, sample.to_come) / np.bincount(decision)
    variance = ((sample.to_come - means[decision]) ** 2).mean()
    return float(max(-1.0, 1 - (sample.to_come - said).var() / variance)) if variance > 0 else 0.0


def action_shares(sample: Sample) -> dict[str, float]:
    """Fraction of the decisions by operation, and by what a graft adds: `wait`, `graft`, `prune`, `heads` …"""
    chosen = sample.observations["candidates"][np.arange(len(sample.actions)), sample.actions]
    grafts = chosen[:, CANDIDATE.index("is_graft")]
    shares = {name: chosen[:, CANDIDATE.index(f"is_{name}")].mean() for name in OPERATIONS}
    return shares | {kind: (grafts * chosen[:, CANDIDATE.index(f"adds_{kind}")]).mean() for kind in GROWTH_KINDS}


def update_metrics(sample: Sample, net: ControllerNet, clip: float) -> dict[str, float]:
    """`clip_fraction`: decisions with p_new/p_old outside 1 ± clip; `kl`: mean of Σ p_old ln(p_old/p_new), nats."""
    before = torch.from_numpy(sample.logits).log_softmax(dim=-1)
    with torch.no_grad():
        after = net.logits({name: torch.from_numpy(array) for name, array in sample.observations.items()})
    after = after.log_softmax(dim=-1)
    ratio = (after - before).gather(-1, torch.from_numpy(sample.actions).unsqueeze(-1)).exp()
    kl = (before.exp() * (before - after)).sum(dim=-1)
    return {"clip_fraction": float(((ratio - 1).abs() > clip).float().mean()), "kl": float(kl.mean())}
