"""The governor detects training faults (spikes in median absolute deviations); `workers/trained.py` handles them."""

import math
import statistics
from collections.abc import Sequence

CHECK_EVERY = 8  # optimizer steps between two checks; also how many losses a check takes together
WINDOW = 128  # losses before them that they are compared with
SPREADS = 10.0  # standard deviations (1.4826 · MAD of a normal) that count as a spike
LEAST_SPIKE = 0.25  # nats: below this nothing is a spike, however quiet the losses were
CHANCE = 0.98  # of ln V: at chance level
LEARNT = 0.9  # of ln V: below it, the model had learnt something


def fault(rows: Sequence[Sequence[float]], window: list[float], vocab_size: int) -> str | None:
    """The fault in words, or None; sound losses, nats, join the `window`. `rows`: a step's loss and gradient norms."""
    losses, chance = [row[0] for row in rows], math.log(vocab_size)
    for row in rows:
        if not all(map(math.isfinite, row)):
            return "a gradient was not finite" if math.isfinite(row[0]) else "the loss was not finite"
    if len(window) >= WINDOW // 2 and losses:
        before, now = statistics.median(window), statistics.median(losses)
        spread = 1.4826 * statistics.median(abs(loss - before) for loss in window)
        if now > before + max(LEAST_SPIKE, SPREADS * spread):
            return f"the loss rose from {before:.2f} to {now:.2f}"
        if before < LEARNT * chance and now > CHANCE * chance:
            return f"the loss rose from {before:.2f} to chance level, {now:.2f}"
    window[:] = [*window, *losses][-WINDOW:]
    return None
