"""Prepared images: pixels and classes of each split, a manifest, batches. N images in all, B in a batch, C channels."""

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from esper.platform.data_spec import ImageSpec
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.host_spec import ResNetSpec
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.workers.tolaria.data.prepared import BaseManifest, Draws, Prepared, Split, digest, evenly, mapped, usable

VERSION = 1

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ImageSplit(Frozen):
    """The count of one split, and its files' checksums."""

    images: PositiveInt
    pixels: Sha256
    labels: Sha256


class ImageManifest(BaseManifest):
    """Of images."""

    made_of: ClassVar[str] = "images"

    kind: Literal["images"] = "images"
    version: Literal[1] = VERSION
    source: str  # a name of `SOURCES`, or an absolute path
    classes: int = Field(ge=2, le=2**16)
    channels: PositiveInt
    size: PositiveInt  # height and width, in pixels
    mean: tuple[Annotated[float, Field(ge=0, le=255)], ...]  # of each channel, over the training images
    deviation: tuple[Annotated[float, Field(ge=1, le=255)], ...]  # at least 1
    splits: dict[Split, ImageSplit] = Field(min_length=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.mean) == len(self.deviation) == self.channels:
            raise ValueError(f"mean and deviation are not of {self.channels} channels.")
        return self

    def fingerprint(self) -> str:
        sums = {name: [split.pixels, split.labels] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.classes

    @property
    def counts(self) -> dict[str, int]:
        return {name: split.images for name, split in self.splits.items()}

    @property
    def made_with(self) -> str:
        """The setting that it is to be used with."""
        return f"data.size={self.size}"

    def __str__(self) -> str:
        shape = f"{self.size} × {self.size} × {self.channels}"
        return f"{self.source}: {self.counts['train']:,} training images of {shape}, {self.classes} classes"


def write_split(folder: Path, name: str, pixels: np.ndarray, labels: np.ndarray) -> ImageSplit:
    """Write a split: uint8 (N, C, size, size), and classes (N,)."""
    sums = {}
    for what, array in (("pixels", pixels), ("labels", labels.astype(np.uint16))):
        path = folder / f"{name}-{what}.npy"
        np.save(path, np.ascontiguousarray(array), allow_pickle=False)
        sums[what] = digest(path)
    return ImageSplit(images=len(pixels), **sums)


class ImageData(Prepared):
    """Prepared images: of a split, uint8 (N, C, size, size) and uint16 (N,)."""

    manifest: ImageManifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        manifest, arrays = ImageManifest.read(path), {}
        read = partial(np.load, mmap_mode="r", allow_pickle=False)
        for name, split in manifest.splits.items():
            shape = split.images, manifest.channels, manifest.size, manifest.size
            sums = (split.pixels, split.labels) if verify else (None, None)
            pixels = mapped(path / f"{name}-pixels.npy", "images", sums[0], read, shape, np.uint8)
            labels = mapped(path / f"{name}-labels.npy", "images", sums[1], read, shape[:1], np.uint16)
            if verify and labels.max() >= manifest.classes:
                with usable(path, "images"):
                    raise ValueError(f"it holds class {labels.max()}, of {manifest.classes}")
            arrays[name] = pixels, labels
        return cls(path, manifest, arrays)

    def check(self, spec: RunSpec) -> None:
        """Raise UserError where the images are not those that the spec's host takes."""
        super().check(spec)
        host, own = spec.host, self.manifest
        assert isinstance(host, ResNetSpec)  # as its data are images
        if (host.image_size, host.image_channels) != (own.size, own.channels):
            what = f"the images of {own.source} are {own.size} × {own.size} × {own.channels}"
            takes = f"{host.image_size} × {host.image_size} × {host.image_channels}"
            mend = f"set host.image_size={own.size} and host.image_channels={own.channels}"
            raise UserError(f"{what}, and the host takes {takes}: {mend}, or data.size to average them down.")

    @cached_property
    def _levels(self) -> Tensor:
        """The training set's mean and deviation of each channel, float32 (2, C, 1, 1)."""
        return torch.tensor([self.manifest.mean, self.manifest.deviation])[:, :, None, None]

    def examples(self, split: Split, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images at `rows` (N,), by the training set's mean and deviation: float32 (N, C, size, size), int64 (N,)."""
        pixels, labels = self.arrays[split]
        sent = torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows].astype(np.int64))
        if device.type == "cuda":
            sent = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in sent)
        mean, deviation = self._levels.to(device)
        return (sent[0].float() - mean) / deviation, sent[1]

    def batches(self, spec: RunSpec, seed: int, part: tuple[float, float], device: torch.device) -> "ImageBatches":
        """Training batches of a spec's runs, from the `part` of the training images between two fractions."""
        self.check(spec)
        return ImageBatches(self, spec, seed, part, device)

    def held_out(self, n: int, spec: RunSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        """`n` examples evenly from all held-out ones."""
        return self.examples("valid", evenly(n, self.manifest.counts["valid"]), device)


class ImageBatches:
    """The images of `part`, fractions of the training ones, in a new order each epoch; shifted and flipped if asked."""

    def __init__(
        self, data: ImageData, spec: RunSpec, seed: int, part: tuple[float, float], device: torch.device
    ) -> None:
        assert isinstance(spec.data, ImageSpec)
        self._data, self._spec, self._seed, self._device = data, spec.data, seed, device
        self._low, high = (int(fraction * data.manifest.counts["train"]) for fraction in part)
        self._count = high - self._low
        self._orders: dict[int, np.ndarray] = {}  # epoch → its images, of the epochs that the last batch was from
        self._moves = Draws(seed, "augment", self._draw)
        if self._count < 1:
            raise UserError(f"a slice of {part} of the training images holds none: take a larger one, or more images.")

    def at(self, optimizer_step: int) -> tuple[Tensor, Tensor]:
        """A step's images, float32 (B, C, size, size), and classes, int64 (B,)."""
        images, labels = self._data.examples("train", self._rows(optimizer_step), self._device)
        if self._spec.crop or self._spec.flip:
            moves = (torch.from_numpy(drawn).to(self._device) for drawn in self._moves.at(optimizer_step))
            images = _moved(images, self._spec.crop, *moves)
        return images, labels

    def _rows(self, step: int) -> np.ndarray:
        epochs, places = np.divmod(step * self._spec.batch_size + np.arange(self._spec.batch_size), self._count)
        known, self._orders = self._orders, {}
        for epoch in range(epochs[0], epochs[-1] + 1):
            drawn = known.get(epoch)
            self._orders[epoch] = stream(self._seed, "data", epoch).permutation(self._count) if drawn is None else drawn
        pieces = [self._orders[epoch][places[epochs == epoch]] for epoch in self._orders]
        return self._low + np.concatenate(pieces)

    def _draw(self, random: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """How far each image is shifted down and right, int64 (B, 2) in [0, 2 crop], and whether it is flipped."""
        size = steps, self._spec.batch_size
        shifts = random.integers(0, 2 * self._spec.crop + 1, (*size, 2))
        return shifts, random.random(size) < 0.5 * self._spec.flip


def _moved(images: Tensor, crop: int, shifts: Tensor, flips: Tensor) -> Tensor:
    """Each image's window into itself with a border of `crop` zeros, its columns in reverse where flipped."""
    across = torch.arange(images.shape[-1], device=images.device)
    rows = shifts[:, :1] + across  # (B, size)
    columns = shifts[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, (crop, crop, crop, crop))
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
