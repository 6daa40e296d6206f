"""Probe: trying actions on copies of a run, and paying for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from esper.platform.contracts import GraftAction
from esper.platform.ledger import Ledger


class Twinned(Protocol):
    """A run that can be copied: `GrowthRun` and `SurrogateRun`."""

    ledger: Ledger

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> tuple[np.ndarray, list[Ledger]]:
        """Training losses under each action, float64 (len(actions), optimizer_steps), and the copies' ledgers after."""
        ...


class ChargedProbe:
    """Implements `Probe` on a run: what its twins use, on every axis, is added to the run's ledger.

    Args:
        run: which the twins are copies of.
    """

    def __init__(self, run: Twinned) -> None:
        self._run = run

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> np.ndarray:
        """Training losses, nats per token, float64 (len(actions), optimizer_steps), on the same batches."""
        before = replace(self._run.ledger)
        losses, ledgers = self._run.twins(actions, optimizer_steps)
        for ledger in ledgers:
            self._run.ledger.add(ledger.less(before))
        return losses
