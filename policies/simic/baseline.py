"""Baseline: shapes rewards, r'ₖ = (rₖ + Φ(sₖ₊₁) − Φ(sₖ)) / σ with Φ(a terminal state) = 0.

Returns span nats, grafts move them by hundredths: unshaped, the value erred by 0.05 nats and the policy did not learn.
Φ: a ridge regression of the return on `globals`, plus per instance a running mean of the residual at each decision
(Mao et al. 2018, 1807.02264); with γ = 1 the best policies stay best (Ng, Harada & Russell 1999). σ, the running
deviation of G − Φ, stands for PPO's reward scaling (Engstrom et al. 2020, 2005.12729).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.platform.telemetry import GLOBALS
from esper.policies.simic.episode import Played

DECAY = 0.9  # of what earlier updates saw
RIDGE = 1e-3  # relative to the number of decisions
VISIT = 0.8  # of what an instance's earlier episodes saw, at each later one
DOUBT = 0.5  # how many episodes say, before any has been seen, that an instance is like the others
KEPT = ("gram", "moment", "weights", "left")  # arrays of its state


class Baseline:
    """Φ and σ (`scale`, nats), fitted to the episodes learned from, with decay."""

    def __init__(self) -> None:
        size = len(GLOBALS) + 1
        self._gram = np.zeros((size, size))  # Σ x xᵀ
        self._moment = np.zeros(size)  # Σ x G
        self._weights = np.zeros(size)
        self._seen: dict[str, np.ndarray] = {}  # instance → at each decision Σ (x, G); x ends in 1: the number
        self._left = np.zeros(2)  # decisions, Σ (G − Φ)²
        self.scale = 1.0

    def potential(self, states: np.ndarray, instance: str | None = None) -> np.ndarray:
        """Φ in nats, float64 (K,), at the first K decisions of an episode, from globals (K, G)."""
        potential = _features(states) @ self._weights
        seen = self._seen.get(instance) if instance is not None else None
        if seen is not None:
            left = (seen[:, -1] - seen[:, :-1] @ self._weights) / (seen[:, -2] + DOUBT)
            potential[: len(left)] += left[: len(potential)]
        return potential

    def potentials(self, episodes: Sequence[Played]) -> list[np.ndarray]:
        """Φ in nats, float64 (K + 1,), of each episode at its decisions and at its end."""
        found = [self.potential(episode.states, episode.instance) for episode in episodes]
        for episode, potential in zip(episodes, found, strict=True):
            if episode.terminated:
                potential[-1] = 0.0
        return found

    def shaped(self, episodes: Sequence[Played], potentials: Sequence[np.ndarray]) -> list[np.ndarray]:
        """r' (K,) of episodes not taken in yet, by their Φ; of the very first, each half by the Φ of the other."""
        if self._gram.any() or len(episodes) < 2:
            return [
                ((episode.rewards + np.diff(potential)) / self.scale).astype(np.float32)
                for episode, potential in zip(episodes, potentials, strict=True)
            ]
        shaped: list[Any] = [None] * len(episodes)
        for i in (0, 1):
            half, own = Baseline(), episodes[i::2]
            half.update(episodes[1 - i :: 2])
            shaped[i::2] = half.shaped(own, half.potentials(own))
        return shaped

    def update(self, episodes: Sequence[Played]) -> None:
        """Take in episodes, which have been shaped before."""
        first, left = not self._gram.any(), self._left_of(episodes)
        x = np.concatenate([_features(episode.states[:-1]) for episode in episodes])
        self._gram = DECAY * self._gram + x.T @ x
        self._moment = DECAY * self._moment + x.T @ np.concatenate([episode.to_come for episode in episodes])
        ridge = RIDGE * self._gram[-1, -1] * np.eye(len(x.T))
        self._weights = np.linalg.solve(self._gram + ridge, self._moment)
        if first:  # there was no Φ yet: how far the next returns will be from this one is not known better
            left = self._left_of(episodes)
        self._left = DECAY * self._left + np.array([len(left), left @ left])
        self.scale = float(np.sqrt(max(self._left[1] / self._left[0], 1e-8)))
        for episode in [each for each in episodes if each.instance is not None]:
            rows = np.column_stack([_features(episode.states[:-1]), episode.to_come])
            old = self._seen.get(str(episode.instance), rows[:0])
            merged = np.zeros((max(len(rows), len(old)), rows.shape[1]))
            merged[: len(old)] = old
            merged[: len(rows)] = rows + VISIT * merged[: len(rows)]
            self._seen[str(episode.instance)] = merged

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        arrays = {name: getattr(self, f"_{name}") for name in KEPT}
        arrays |= {f"seen.{i}": rows for i, rows in enumerate(self._seen.values())}
        values = {"scale": self.scale, "instances": list(self._seen)}
        return values, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def load(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a state; a ValueError or KeyError where it is none."""
        for name in KEPT:
            if tensors[name].shape != getattr(self, f"_{name}").shape or not tensors[name].isfinite().all():
                raise ValueError(f"its baseline's {name} is of another shape, or not finite")
            setattr(self, f"_{name}", tensors[name].numpy())
        self.scale = float(values["scale"])
        self._seen = {str(name): tensors[f"seen.{i}"].numpy() for i, name in enumerate(values["instances"])}
        if any(rows.shape[1:] != (len(self._gram) + 1,) for rows in self._seen.values()):
            raise ValueError("its baseline's instances are of another shape")

    def _left_of(self, episodes: Sequence[Played]) -> np.ndarray:  # G − Φ at every decision
        return np.concatenate([e.to_come - self.potential(e.states[:-1], e.instance) for e in episodes])


def _features(states: np.ndarray) -> np.ndarray:
    return np.concatenate([states.astype(np.float64), np.ones((len(states), 1))], axis=1)
