"""What is trained and evaluated on: windows of prepared text. B sequences, T block size."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec

if TYPE_CHECKING:
    from esper.workers.tolaria.data.shards import TokenData

STEPS_AT_ONCE = 256  # whose batches are drawn at once, as seeding costs more than drawing


class Batches:
    """Random windows of `part`, fractions of the training tokens, by seed and step alone: no cursor is saved."""

    def __init__(
        self, spec: RunSpec, data: "TokenData", seed: int, part: tuple[float, float], device: torch.device
    ) -> None:
        self._data, self._seed, self._device = data, seed, device
        self._batch_size, self._block_size = spec.data.batch_size, spec.host.tokens
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


def held_out(data: "TokenData", n: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`n` whole windows evenly from all of the validation text: inputs, targets int64 (n, T)."""
    whole = (data.tokens("valid") - 1) // block_size
    if whole < 1:
        raise _too_short("validation", data.tokens("valid"), block_size)
    windows = data.windows("valid", evenly(n, whole) * block_size, block_size + 1)
    batch = torch.from_numpy(windows).to(device)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def evenly(n: int, among: int) -> np.ndarray:
    """`n` of `range(among)`, or all of it, at equal distances: neighbours in a text tell much the same."""
    n = min(max(1, n), among)
    return np.arange(n) * among // n


def _too_short(which: str, tokens: int, block_size: int) -> UserError:
    what = f"the {which} text has {tokens} tokens, too few for a context of {block_size}"
    return UserError(f"{what}: give more text, or set a smaller host.block_size.")
