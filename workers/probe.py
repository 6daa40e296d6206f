"""Probe: tries actions on copies of a run, at its cost."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from esper.platform.contracts import GraftAction
from esper.workers.episode import Episode


class ChargedProbe:
    """Implements `Probe` on a run; its ledger is charged for the twins on every axis."""

    def __init__(self, run: Episode) -> None:
        self._run = run

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> np.ndarray:
        """Training losses, nats per token, float64 (len(actions), optimizer_steps), on the same batches."""
        before = replace(self._run.ledger)
        losses, ledgers = self._run.twins(actions, optimizer_steps)
        for ledger in ledgers:
            self._run.ledger.add(ledger.less(before))
        return losses
