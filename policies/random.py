"""Random grafts, at a rate or as many as another run's: tells judgement from growth itself."""

from collections.abc import Sequence

from esper.platform.contracts import GraftAction, Probe
from esper.platform.seeding import stream
from esper.platform.telemetry import Telemetry

RATE = 0.2


class RandomPolicy:
    """Grafts by draws keyed by (seed, decision), with probability `RATE` at each.

    With `matched` instead those blueprints, once per mention, in random order, at random sites, before the rate decays.
    """

    def __init__(self, seed: int = 0, *, matched: Sequence[str] | None = None) -> None:
        self._seed, self._matched = seed, matched
        self._pending: list[str] = []

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        random = stream(self._seed, "policy", telemetry.sequence)
        if telemetry.sequence == 0 and self._matched is not None:
            self._pending = list(random.permutation(list(self._matched)))
        grafts = [i for i in telemetry.legal() if telemetry.actions[i].operation == "graft"]
        if self._matched is None:
            wanted, chance = grafts, RATE
        else:
            nxt = self._pending[0] if self._pending else None
            wanted = [i for i in grafts if telemetry.actions[i].blueprint == nxt]
            left = round(10 ** telemetry.get("growth_decisions_left") - 1)
            chance = len(self._pending) / max(1, left)
        if not wanted or random.random() >= chance:
            return GraftAction(0, telemetry.sequence, "drew wait")
        if self._matched is not None:
            self._pending.pop(0)
        return GraftAction(int(random.choice(wanted)), telemetry.sequence, "drawn")

    def state(self) -> list[str]:
        return [str(name) for name in self._pending]

    def resume(self, state: list[str]) -> None:
        self._pending = list(state)

    def unplayed(self) -> list[str]:
        return self.state()
