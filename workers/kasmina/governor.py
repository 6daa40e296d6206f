"""The governor's eyes: is the training still sound? What to do about a fault is the run's (`workers/run.py`).

A fault is a loss or a gradient that is not finite, a spike (the median of the latest losses far above that of the ones
before, by their median absolute deviation, which a few outliers do not move), or a jump back to chance level, ln V.
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
    """Looks at each step's loss and gradient norms, a few steps at a time.

    Args:
        vocab_size: V.

    Attributes:
        window: the latest losses, nats per token: all that it remembers.
    """

    def __init__(self, vocab_size: int) -> None:
        self._chance = math.log(vocab_size)
        self.window: list[float] = []

    def fault(self, rows: Sequence[Sequence[float]]) -> str | None:
        """What is wrong, in words, or None.

        Args:
            rows: of each new step, its training loss in nats per token first; every number must be finite.
        """
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
