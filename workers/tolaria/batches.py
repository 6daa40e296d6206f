"""Batches: which tokens a run sees at an optimizer step, and the fixed held-out set.

The batch of a step depends on the seed and the step's number alone, so a graft changes no later batch, twins see the
same ones, and resuming needs no cursor. Positions are drawn for a block of steps at once: seeding a stream costs more
than drawing from it.

B sequences, T block size.
"""

import numpy as np
import torch
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.seeding import stream
from esper.workers.tolaria.data import TokenData

STEPS_AT_ONCE = 256


class Batches:
    """Random windows of a slice of the training tokens.

    Args:
        data: the prepared shards.
        seed: of the `data` stream.
        batch_size: B.
        block_size: T.
        part: slice of the training tokens, as fractions.
        device: where the tensors go.

    Raises:
        UserError: the slice holds no window.
    """

    def __init__(
        self,
        data: TokenData,
        seed: int,
        batch_size: int,
        block_size: int,
        part: tuple[float, float],
        device: torch.device,
    ) -> None:
        self._split = data.split("train")
        self._seed, self._batch_size, self._block_size, self._device = seed, batch_size, block_size, device
        self._low, high = (int(fraction * self._split.tokens) for fraction in part)
        self._high = high - block_size
        self._drawn = (-1, np.empty((0, batch_size), dtype=np.int64))  # (block of steps, their positions)
        if self._high <= self._low:
            raise UserError(
                f"the training text has {high - self._low} tokens, too few for a context of {block_size}: "
                "give more text, or set a smaller host.block_size."
            )

    def at(self, optimizer_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 (B, T) each."""
        block, row = divmod(optimizer_step, STEPS_AT_ONCE)
        if block != self._drawn[0]:
            size = (STEPS_AT_ONCE, self._batch_size)
            self._drawn = block, stream(self._seed, "data", block).integers(self._low, self._high, size)
        starts = self._drawn[1][row]
        windows = torch.from_numpy(self._split.windows(starts, self._block_size + 1))  # (B, T + 1)
        if self._device.type == "cuda":
            windows = windows.pin_memory().to(self._device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]


def held_out(data: TokenData, tokens: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first `tokens` validation tokens (or all there are) as inputs and targets, int64 (n, T) each."""
    return _windows(data, 0, tokens // block_size, block_size, device)


def held_out_sample(data: TokenData, n: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The last `n` whole windows of the validation tokens (or all there are), int64 (n, T) each."""
    whole = (data.split("valid").tokens - 1) // block_size
    return _windows(data, max(0, whole - n), n, block_size, device)


def _windows(data: TokenData, first: int, n: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    split = data.split("valid")
    n = min(n, (split.tokens - 1) // block_size - first)
    if n < 1:
        raise UserError(
            f"the validation text has {split.tokens} tokens, too few for a context of {block_size}: "
            "give more text, or set a smaller host.block_size."
        )
    windows = torch.from_numpy(split.windows((first + np.arange(n)) * block_size, block_size + 1)).to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
