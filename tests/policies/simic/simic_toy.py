"""A toy growth task: of two rows that look like grafts, one pays; a global tells which. WAIT pays a little."""

import time

import numpy as np

from esper.platform.contracts import GraftAction, Instance, Transition
from esper.platform.telemetry import CANDIDATE, GLOBALS, SITE, WAIT, Candidate, Telemetry, TelemetrySpace

SPACE = TelemetrySpace(sites=3, candidates=5)
DECISIONS = 8
BEST = DECISIONS * 1.0


class ToyRun:
    """An episode of 8 decisions. Row 1 adds heads, row 2 width; `gradient_noise` > 0 says that heads pay.

    Rewards: 1 for the row that pays, −1 for the other, 0.2 for WAIT. Best return 8; always WAIT 1.6.

    `expected`: what it says that a decision takes; `fail_at`: the decision at which it raises `error`.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        fail_at: int | None = None,
        error: Exception | None = None,
        expected: float | None = None,
    ) -> None:
        self._expected = expected or seconds or 1e-3
        self._seconds, self._fail_at = seconds, fail_at
        self._error = error or RuntimeError("the toy broke")

    def reset(self, instance: Instance | None = None, seed: int = 0) -> Telemetry:
        self.seed, self.k = seed, 0
        return self._observe()

    def step(self, action: GraftAction) -> Transition:
        if self._seconds:
            time.sleep(self._seconds)
        if self.k == self._fail_at:
            raise self._error
        assert action.sequence == self.k
        assert self.mask[action.index]
        reward = {0: 0.2, self.paying: 1.0}.get(action.index, -1.0)
        self.k += 1
        ended = self.k == DECISIONS
        info = {"summary": {"val_loss": 1.5, "seed": self.seed}} if ended else {}
        return Transition(self._observe(), reward, terminated=ended, info=info)

    def summary(self) -> dict[str, object]:
        return {}

    def expected_seconds(self) -> float:
        return self._expected

    def state(self):
        return {"seed": self.seed, "k": self.k}, {}

    def load(self, values, tensors) -> None:
        self.seed, self.k = values["seed"], values["k"]
        self._observe()

    def _observe(self) -> Telemetry:
        sign = int(np.random.default_rng([self.seed, self.k]).choice([-1, 1]))  # no seeding.py: it imports torch
        self.paying = 1 if sign > 0 else 2
        arrays = {name: np.zeros(shape, np.float32) for name, shape in SPACE.shapes.items()}
        arrays["globals"][GLOBALS.index("gradient_noise")] = sign
        arrays["globals"][GLOBALS.index("budget_used")] = self.k / DECISIONS
        arrays["sites"][:2, SITE.index("present")] = 1
        rows = arrays["candidates"]
        rows[:3, CANDIDATE.index("present")] = 1
        rows[0, CANDIDATE.index("is_wait")] = 1
        rows[1:3, CANDIDATE.index("is_graft")] = 1
        rows[1, CANDIDATE.index("adds_heads")] = rows[2, CANDIDATE.index("adds_width")] = 1
        self.mask = np.array([True, True, True, False, False])
        actions = (WAIT, Candidate("graft", "a", "heads"), Candidate("graft", "b", "width"))
        arrays.pop("mask")
        self.telemetry = Telemetry(self.k, **arrays, mask=self.mask, site_ids=("a", "b"), actions=actions)
        return self.telemetry
