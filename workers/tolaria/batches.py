"""Batches and the fixed held-out set. A batch depends on the seed and its step alone: resuming needs no cursor.

Positions are drawn for many steps at once, as seeding costs more than drawing. B sequences, T block size.
"""

import numpy as np
import torch
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.workers.tolaria.data import TokenData

STEPS_AT_ONCE = 256


class Batches:
    """Random windows of `part`, fractions of the training tokens; UserError where it holds none."""

    def __init__(
        self, spec: RunSpec, data: TokenData, seed: int, part: tuple[float, float], device: torch.device
    ) -> None:
        self._data, self._seed, self._device = data, seed, device
        self._batch_size, self._block_size = spec.data.batch_size, spec.host.block_size
        self.low, high = (int(fraction * data.tokens("train")) for fraction in part)
        self._high = high - self._block_size
        self._drawn = (-1, np.empty((0, self._batch_size), dtype=np.int64))  # (block of steps, their positions)
        if self._high <= self.low:
            raise _too_short("training", high - self.low, self._block_size)

    def at(self, optimizer_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 (B, T) each."""
        block, row = divmod(optimizer_step, STEPS_AT_ONCE)
        if block != self._drawn[0]:
            size = (STEPS_AT_ONCE, self._batch_size)
            self._drawn = block, stream(self._seed, "data", block).integers(self.low, self._high, size)
        windows = self._data.windows("train", self._drawn[1][row], self._block_size + 1)
        batch = torch.from_numpy(windows)  # (B, T + 1)
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


def held_out(
    data: TokenData, n: int, block_size: int, device: torch.device, *, last: bool = False
) -> tuple[Tensor, Tensor]:
    """The first or last `n` whole validation windows, or all there are, at least one: inputs, targets int64 (n, T)."""
    whole = (data.tokens("valid") - 1) // block_size
    first = max(0, whole - n) if last else 0
    n = min(n, whole - first)
    if n < 1:
        raise _too_short("validation", data.tokens("valid"), block_size)
    starts = (first + np.arange(n)) * block_size
    windows = torch.from_numpy(data.windows("valid", starts, block_size + 1)).to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _too_short(which: str, tokens: int, block_size: int) -> UserError:
    return UserError(
        f"the {which} text has {tokens} tokens, too few for a context of {block_size}: "
        "give more text, or set a smaller host.block_size."
    )
