"""Baseline: takes out of the rewards what no action decides, and gives the rest a scale of 1.

What is still to be gained is the loss now less the final loss: returns span nats and are almost linear in telemetry,
while grafts move them by hundredths. A value network that has to cover the nats misses the hundredths: steps of Adam
move every output by about rate × width, whatever the scale of the targets, and that alone drowned them (measured: an
explained variance of 0.995 left an error of 0.05 nats, and the policy did not learn).

So a ridge regression Φ of the return on `globals` is kept, and the learner is given

    r'ₖ = (rₖ + Φ(sₖ₊₁) − Φ(sₖ)) / σ,      Φ(a terminal state) = 0.

With γ = 1 that is potential-based shaping (Ng, Harada & Russell 1999): sums of r' along a trajectory differ from those
of r by Φ(s₀) and the unit only, so the same policies are best; σ, the running standard deviation of G − Φ, stands for
PPO's reward scaling (Engstrom et al. 2020, 2005.12729). The value network learns (V − Φ)/σ. Metrics are of the true r.
"""

from typing import Any

import numpy as np

from esper.platform.telemetry import GLOBALS

DECAY = 0.9  # of what earlier updates saw
RIDGE = 1e-3  # relative to the number of decisions


class Baseline:
    """Φ and σ, fitted to the episodes that were learned from, the latest most."""

    def __init__(self) -> None:
        size = len(GLOBALS) + 1
        self._gram = np.zeros((size, size))  # Σ x xᵀ
        self._moment = np.zeros(size)  # Σ x G
        self._squares = 0.0  # Σ G²
        self._weights = np.zeros(size)
        self.scale = 1.0  # σ, nats

    def update(self, states: np.ndarray, returns: np.ndarray) -> None:
        """Take in decisions: globals float32 (N, G) and what was still to come there, in nats (N,)."""
        x = _features(states)
        self._gram = DECAY * self._gram + x.T @ x
        self._moment = DECAY * self._moment + x.T @ returns
        self._squares = DECAY * self._squares + returns @ returns
        count = self._gram[-1, -1]
        self._weights = np.linalg.solve(self._gram + RIDGE * count * np.eye(len(x.T)), self._moment)
        w = self._weights
        squares = self._squares - 2 * w @ self._moment + w @ self._gram @ w
        self.scale = float(np.sqrt(max(squares / count, 1e-8)))

    def potential(self, states: np.ndarray) -> np.ndarray:
        """Φ in nats, float64: (N, G) → (N,)."""
        return _features(states) @ self._weights

    def shaped(self, rewards: np.ndarray, states: np.ndarray, terminated: bool) -> np.ndarray:
        """r' (K,) of an episode with K rewards and K + 1 states."""
        potential = self.potential(states)
        if terminated:
            potential[-1] = 0.0
        return ((rewards + np.diff(potential)) / self.scale).astype(np.float32)

    def state(self) -> dict[str, Any]:
        """To be kept with a checkpoint."""
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a kept state."""
        vars(self).update(state)


def _features(states: np.ndarray) -> np.ndarray:
    return np.concatenate([states.astype(np.float64), np.ones((len(states), 1))], axis=1)
