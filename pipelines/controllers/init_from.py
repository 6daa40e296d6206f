"""A training that begins with a trained policy, of any domain, and is held near to it: fine-tuning."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from esper.policies.simic.baseline import Baseline
from esper.policies.simic.episode import Played
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import SimicPolicy, trained_on
from esper.policies.simic.ppo import begin_from


class Given:
    """Stands where `Rounds` does: the given policy is the first checkpoint, and the anchor of every iteration."""

    def __init__(self, path: Path) -> None:
        self._policy = SimicPolicy.load(path)
        self.hosts = trained_on(self._policy)["hosts"]

    def begin(self, first: Path, extra: dict[str, Any]) -> None:
        """Leave the policy as a training's first checkpoint."""
        begin_from(self._policy, Baseline(), first, extra)

    def anchor(self, iteration: int) -> ControllerNet:
        """The same for every iteration."""
        return self._policy.net

    def note(self, iteration: int, episodes: Iterable[Played]) -> None:
        """Nothing is fitted to episodes."""

    def told(self) -> list[dict[str, Any]]:
        """No clones."""
        return []
