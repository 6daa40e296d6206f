"""The governor detects training faults; the run (`workers/run.py`) handles them.

A fault is a non-finite loss or gradient, a spike (the median loss far above the window's, in median absolute
deviations) or a return to chance level, ln V.
"""

import math
import statistics
from collections.abc import Sequence

CHECK_EVERY = 8  # optimizer steps between two checks; also how many losses a check takes together
WINDOW = 128  # losses before them that they are compared with
SPREADS = 10.0  # standard deviations (1.4826 · MAD of a normal) that count as a spike
LEAST_SPIKE = 0.25  # nats: below this nothing is a spike, however quiet the losses were
CHANCE = 0.98  # of ln V: at chance level
LEARNT = 0.9  # of ln V: below it, the model had learnt something


class Governor:
    """Checks each step's loss and gradient norms, a few steps at a time."""

    def __init__(self, vocab_size: int) -> None:
        self._chance = math.log(vocab_size)
        self.window: list[float] = []  # latest losses, nats per token: its whole state

    def fault(self, rows: Sequence[Sequence[float]]) -> str | None:
        """The fault in words, or None; `rows`: each new step's loss in nats per token, then its gradient norms."""
        for row in rows:
            if not math.isfinite(row[0]):
                return "the loss was not finite"
            if not all(map(math.isfinite, row)):
                return "a gradient was not finite"
        losses = [row[0] for row in rows]
        if len(self.window) >= WINDOW // 2 and losses:
            before, now = statistics.median(self.window), statistics.median(losses)
            spread = 1.4826 * statistics.median(abs(loss - before) for loss in self.window)
            if now > before + max(LEAST_SPIKE, SPREADS * spread):
                return f"the loss rose from {before:.2f} to {now:.2f}"
            if before < LEARNT * self._chance and now > CHANCE * self._chance:
                return f"the loss rose from {before:.2f} to chance level, {now:.2f}"
        self.window = [*self.window, *losses][-WINDOW:]
        return None
