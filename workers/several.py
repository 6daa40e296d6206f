"""A run of whichever of several specs its instance names; observations are padded to the largest telemetry sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from esper.platform.contracts import GraftAction, Instance, Run, Transition
from esper.platform.errors import in_a_sentence
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Telemetry, TelemetrySpace
from esper.workers.observe import telemetry_space


def shared_space(specs: Sequence[RunSpec]) -> TelemetrySpace:
    """The least telemetry sizes that hold every spec's observations."""
    spaces = [telemetry_space(spec) for spec in specs]
    return TelemetrySpace(max(each.sites for each in spaces), max(each.candidates for each in spaces))


class SeveralRuns:
    """Implements Run by the one of `runs` whose number is the instance's `task`."""

    def __init__(self, runs: Sequence[Run], space: TelemetrySpace) -> None:
        self._runs, self._space, self._now = runs, space, runs[0]

    def reset(self, instance: Instance | None = None, seed: int = 0) -> Telemetry:
        self._now = self._runs[0 if instance is None else instance.task]
        self._now.reset(instance, seed)
        return self.telemetry

    def step(self, action: GraftAction) -> Transition:
        outcome = self._now.step(action)
        return replace(outcome, telemetry=padded(outcome.telemetry, self._space))

    @property
    def telemetry(self) -> Telemetry:
        return padded(self._now.telemetry, self._space)

    def summary(self) -> dict[str, Any]:
        return self._now.summary()

    def sample(self, tokens: int) -> str | None:
        return self._now.sample(tokens)

    def expected_seconds(self) -> float:
        return self._now.expected_seconds()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._now.state()

    def load(self, values: dict[str, Any], tensors: Mapping[str, Any]) -> None:
        with in_a_sentence("the checkpoint names no task", "restore an older copy of it"):
            self._now = self._runs[values["instance"]["task"]]
        self._now.load(values, tensors)


def padded(telemetry: Telemetry, space: TelemetrySpace) -> Telemetry:
    """The same observation with zero rows up to the sizes of `space`."""

    def rows(array: np.ndarray, count: int) -> np.ndarray:
        return np.concatenate([array, np.zeros((count - len(array), *array.shape[1:]), array.dtype)])

    return replace(
        telemetry,
        sites=rows(telemetry.sites, space.sites),
        candidates=rows(telemetry.candidates, space.candidates),
        mask=rows(telemetry.mask, space.candidates),
    )
