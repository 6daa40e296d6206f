"""A toy growth task: of two rows that look like grafts, one pays; a global tells which. WAIT pays a little."""

import time

import numpy as np

from esper.platform.contracts import GraftAction, Instance, Transition
from esper.platform.telemetry import CANDIDATE, GLOBALS, SITE, WAIT, Candidate, Telemetry, TelemetrySpace

SPACE = TelemetrySpace(sites=3, candidates=5)
DECISIONS = 8
BEST = DECISIONS * 1.0


class ToyRun:
    """An episode of 8 decisions. Row 1 adds heads, row 2 width; `slope_fast` > 0 says that heads pay.

    Rewards: 1 for the row that pays, −1 for the other, 0.2 for WAIT. Best return 8; always WAIT 1.6.

    `expected`: what it says that a decision takes; `fail_at`: the decision at which it raises `error`.
    """

    def __init__(self, seconds=0.0, fail_at=None, error=None, expected=0.0) -> None:
        self._seconds, self._fail_at, self._error = seconds, fail_at, error or RuntimeError("the toy broke")
        self._expected = expected or seconds or 1e-3

    def reset(self, instance: Instance | None = None, seed: int = 0) -> Telemetry:
        self.seed, self.k = seed, 0
        return self._observe()

    def step(self, action: GraftAction) -> Transition:
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

    def sample(self, tokens) -> None:
        return None

    def expected_seconds(self) -> float:
        return self._expected

    def state(self):
        return {"seed": self.seed, "k": self.k}, {}

    def load(self, values, tensors) -> None:
        self.seed, self.k = values["seed"], values["k"]
        self._observe()

    def _observe(self) -> Telemetry:
        sign = int(np.random.default_rng([self.seed, self.k]).choice([-1, 1]))
        self.paying = 1 if sign > 0 else 2
        arrays = {name: np.zeros(shape, np.float32) for name, shape in SPACE.shapes.items()}
        arrays["globals"][GLOBALS.index("slope_fast")] = sign
        arrays["globals"][GLOBALS.index("budget_used")] = self.k / DECISIONS
        arrays["sites"][:2, SITE.index("present")] = 1
        for i, shown in enumerate((("is_wait",), ("is_graft", "adds_heads"), ("is_graft", "adds_width"))):
            arrays["candidates"][i, [CANDIDATE.index(name) for name in ("present", *shown)]] = 1
        self.mask = np.array([True, True, True, False, False])
        actions = (WAIT, Candidate("graft", "a", "heads"), Candidate("graft", "b", "width"))
        arrays.pop("mask")
        self.telemetry = Telemetry(self.k, **arrays, mask=self.mask, site_ids=("a", "b"), actions=actions)
        return self.telemetry
