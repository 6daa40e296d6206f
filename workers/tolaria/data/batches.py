"""What is trained and evaluated on: windows of prepared text, and images. B examples, T block size."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.seeding import stream
from esper.platform.spec import ImageSpec, RunSpec

STEPS_AT_ONCE = 256  # whose batches are drawn at once, as seeding costs more than drawing

Windows = Callable[[np.ndarray, int], np.ndarray]  # starts (windows,) and a length → a split's tokens there


class Batches:
    """Random windows of `part`, fractions of the training tokens, by seed and step alone: no cursor is saved."""

    def __init__(
        self,
        spec: RunSpec,
        windows: Windows,
        tokens: int,
        seed: int,
        part: tuple[float, float],
        device: torch.device,
    ) -> None:
        self._windows, self._seed, self._device = windows, seed, device
        self._batch_size, self._block_size = spec.data.batch_size, spec.host.tokens
        self.low, high = (int(fraction * tokens) for fraction in part)
        self._high = high - self._block_size
        self._drawn = (-1, np.empty((0, self._batch_size), dtype=np.int64))  # (block of steps, their positions)
        if self._high <= self.low:
            raise too_short("training", high - self.low, self._block_size)

    def at(self, optimizer_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 (B, T) each."""
        block, row = divmod(optimizer_step, STEPS_AT_ONCE)
        if block != self._drawn[0]:
            size = (STEPS_AT_ONCE, self._batch_size)
            self._drawn = block, stream(self._seed, "data", block).integers(self.low, self._high, size)
        windows = self._windows(self._drawn[1][row], self._block_size + 1)
        batch = torch.from_numpy(windows)  # (B, T + 1)
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


class ImageBatches:
    """The images of `part`, fractions of the training ones, in a new order each epoch; shifted and flipped if asked."""

    def __init__(
        self,
        spec: ImageSpec,
        examples: Callable[[np.ndarray], tuple[Tensor, Tensor]],  # images and classes at rows, on the device
        count: int,
        seed: int,
        part: tuple[float, float],
    ) -> None:
        self._spec, self._examples, self._seed = spec, examples, seed
        self.low, high = (int(fraction * count) for fraction in part)
        self._count = high - self.low
        self._orders: dict[int, np.ndarray] = {}  # epoch → its images, of the epochs that the last batch was from
        self._drawn = (-1, np.empty(0), np.empty(0))  # (block of steps, their shifts, their flips)
        if self._count < 1:
            raise UserError(f"a slice of {part} of the training images holds none: take a larger one, or more images.")

    def at(self, optimizer_step: int) -> tuple[Tensor, Tensor]:
        """A step's images, float32 (B, channels, size, size), and classes, int64 (B,)."""
        rows, moves = self._rows(optimizer_step), self._moves(optimizer_step)
        images, labels = self._examples(rows)
        if self._spec.crop or self._spec.flip:
            images = _moved(images, self._spec.crop, *(torch.from_numpy(drawn).to(images.device) for drawn in moves))
        return images, labels

    def _rows(self, step: int) -> np.ndarray:
        """Of the training images, int64 (B,)."""
        epochs, places = np.divmod(step * self._spec.batch_size + np.arange(self._spec.batch_size), self._count)
        needed = range(epochs[0], epochs[-1] + 1)
        known, self._orders = self._orders, {}
        for epoch in needed:
            drawn = known.get(epoch)
            self._orders[epoch] = stream(self._seed, "data", epoch).permutation(self._count) if drawn is None else drawn
        return self.low + np.array([self._orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])

    def _moves(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """How far each image is shifted down and right, int64 (B, 2) in [0, 2 crop], and whether it is flipped."""
        block, row = divmod(step, STEPS_AT_ONCE)
        if block != self._drawn[0]:
            draws, size = stream(self._seed, "augment", block), (STEPS_AT_ONCE, self._spec.batch_size)
            shifts = draws.integers(0, 2 * self._spec.crop + 1, (*size, 2))
            self._drawn = block, shifts, draws.random(size) < 0.5 * self._spec.flip
        return self._drawn[1][row], self._drawn[2][row]


def _moved(images: Tensor, crop: int, shifts: Tensor, flips: Tensor) -> Tensor:
    """Each image's window into itself with a border of `crop` zeros, its columns in reverse where flipped."""
    across = torch.arange(images.shape[-1], device=images.device)
    rows = shifts[:, :1] + across  # (B, size)
    columns = shifts[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, (crop, crop, crop, crop))
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def held_out(windows: Windows, tokens: int, n: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`n` whole windows evenly from all of the validation text: inputs, targets int64 (n, T)."""
    whole = (tokens - 1) // block_size
    if whole < 1:
        raise too_short("validation", tokens, block_size)
    batch = torch.from_numpy(windows(evenly(n, whole) * block_size, block_size + 1)).to(device)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def evenly(n: int, among: int) -> np.ndarray:
    """`n` of `range(among)`, or all of it, at equal distances: neighbours in a text tell much the same."""
    n = min(max(1, n), among)
    return np.arange(n) * among // n


def too_short(which: str, tokens: int, block_size: int) -> UserError:
    """The error for a text, or a slice of one, that holds no example."""
    what = f"the {which} text has {tokens} tokens, too few for a context of {block_size}"
    return UserError(f"{what}: give more text, or set a smaller host.block_size.")
