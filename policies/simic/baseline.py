"""Baseline: takes out of the rewards what no action decides, and gives the rest a scale of 1.

What is still to be gained is the loss now less the final loss: returns span nats and are almost linear in telemetry,
while grafts move them by hundredths. A value network that has to cover the nats misses the hundredths: steps of Adam
move every output by about rate × width, whatever the scale of the targets, and that alone drowned them (measured: an
explained variance of 0.995 left an error of 0.05 nats, and the policy did not learn).

So a ridge regression of the return on `globals` is kept, and on top of it, for each instance, a mean of what it leaves
at each decision, the latest episodes most: together Φ. The learner is given

    r'ₖ = (rₖ + Φ(sₖ₊₁) − Φ(sₖ)) / σ,      Φ(a terminal state) = 0.

With γ = 1 that is potential-based shaping (Ng, Harada & Russell 1999): sums of r' along a trajectory differ from those
of r by Φ(s₀) and the unit only, so the same policies are best; σ, the running standard deviation of G − Φ, stands for
PPO's reward scaling (Engstrom et al. 2020, 2005.12729). The value network learns (V − Φ)/σ. Metrics are of the true r.

An instance's mean is an input-dependent baseline (Mao et al. 2018, 1807.02264): which instance is played is not the
policy's doing, telemetry tells it late or never, and a harder one is no worse decision. An episode's own return is not
in the mean that it is compared with.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from esper.platform.telemetry import GLOBALS

DECAY = 0.9  # of what earlier updates saw
RIDGE = 1e-3  # relative to the number of decisions
VISIT = 0.8  # of what an instance's earlier episodes saw, at each later one
DOUBT = 0.5  # how many episodes say, before any has been seen, that an instance is like the others
MOST = 50_000  # places that are remembered, those seen last

Place = tuple[Hashable, int]
"""An instance, by whatever names it (None is none), and the number of a decision in its episode."""


def places(instance: Hashable | None, states: int) -> list[Place]:
    """The places of an episode's states, in order."""
    return [(instance, k) for k in range(states)]


class Baseline:
    """Φ and σ, fitted to the episodes that were learned from, the latest most."""

    def __init__(self) -> None:
        size = len(GLOBALS) + 1
        self._gram = np.zeros((size, size))  # Σ x xᵀ
        self._moment = np.zeros(size)  # Σ x G
        self._squares = 0.0  # Σ G²
        self._weights = np.zeros(size)
        self._seen: dict[Place, np.ndarray] = {}  # Σ (x, G); x ends in 1, so the number is in it
        self._latest: list[tuple[Place, np.ndarray]] = []  # of the last update, still to be taken into `_seen`
        self._left = np.zeros(2)  # decisions, Σ (G − Φ)²
        self.scale = 1.0  # σ, nats

    def update(self, states: np.ndarray, returns: np.ndarray, at: Sequence[Place] = ()) -> None:
        """Take in decisions, before `shaped` is asked about them.

        Args:
            states: globals there, float32 (N, G).
            returns: what was still to come, in nats (N,).
            at: their places, N or none.
        """
        x = _features(states)
        self._gram = DECAY * self._gram + x.T @ x
        self._moment = DECAY * self._moment + x.T @ returns
        self._squares = DECAY * self._squares + returns @ returns
        count = self._gram[-1, -1]
        self._weights = np.linalg.solve(self._gram + RIDGE * count * np.eye(len(x.T)), self._moment)
        w = self._weights
        squares = self._squares - 2 * w @ self._moment + w @ self._gram @ w
        self._remember()
        if any(instance is not None for instance, _ in at):
            left = returns - self.potential(states, at)
            self._left = DECAY * self._left + np.array([len(left), left @ left])
            count, squares = self._left
            self._latest = list(zip(at, np.column_stack([x, returns]), strict=True))
        self.scale = float(np.sqrt(max(squares / count, 1e-8)))

    def potential(self, states: np.ndarray, at: Sequence[Place] = ()) -> np.ndarray:
        """Φ in nats, float64: (N, G) and N places (or none) → (N,)."""
        offsets = [self._offset(place) for place in at] or 0.0
        return _features(states) @ self._weights + offsets

    def shaped(
        self, rewards: np.ndarray, states: np.ndarray, terminated: bool, instance: Hashable | None = None
    ) -> np.ndarray:
        """r' (K,) of an episode with K rewards and K + 1 states."""
        potential = self.potential(states, places(instance, len(states)))
        if terminated:
            potential[-1] = 0.0
        return ((rewards + np.diff(potential)) / self.scale).astype(np.float32)

    def state(self) -> dict[str, Any]:
        """To be kept with a checkpoint."""
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a kept state."""
        vars(self).update(state)

    def _offset(self, place: Place) -> float:
        """Mean of what the regression left there, in nats."""
        seen = self._seen.get(place)
        return 0.0 if seen is None else float(seen[-1] - seen[:-1] @ self._weights) / (seen[-2] + DOUBT)

    def _remember(self) -> None:
        """Take the last update's decisions in: from now on none of them is compared with itself."""
        for place, row in self._latest:
            if place[0] is not None:
                self._seen[place] = row + VISIT * self._seen.pop(place, 0.0)
        self._latest = []
        for place in list(self._seen)[: max(0, len(self._seen) - MOST)]:
            del self._seen[place]


def _features(states: np.ndarray) -> np.ndarray:
    return np.concatenate([states.astype(np.float64), np.ones((len(states), 1))], axis=1)
