"""Prepared images: a file of pixels and one of classes per split, and their manifest.

The files are mapped into memory, so all processes of a machine share one copy. N images, C channels.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt
from pydantic_core import from_json
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import ImageSpec, ResNetSpec, RunSpec
from esper.workers.tolaria.data.batches import ImageBatches, evenly
from esper.workers.tolaria.data.shards import FILE, Split

VERSION = 1

Level = Annotated[float, Field(ge=0, le=255)]  # a pixel's


class ImageSplit(Frozen):
    """The count of one split, and its files' checksums."""

    images: PositiveInt
    pixels: str = Field(pattern="^[0-9a-f]{64}$")
    labels: str = Field(pattern="^[0-9a-f]{64}$")


class ImageManifest(Frozen):
    """The content of `manifest.json`."""

    kind: Literal["images"] = "images"
    version: Literal[1] = VERSION
    source: str  # a name of `SOURCES`, or an absolute path
    classes: int = Field(ge=2, le=2**16)
    channels: PositiveInt
    size: PositiveInt  # height and width, in pixels
    mean: tuple[Level, ...]  # of each channel, over the training images
    deviation: tuple[Level, ...]
    splits: dict[Split, ImageSplit] = Field(min_length=2)

    def fingerprint(self) -> str:
        """A hash of pixels and classes, independent of the folder."""
        sums = {name: [split.pixels, split.labels] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Kinds of targets."""
        return self.classes

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {name: split.images for name, split in self.splits.items()}

    @property
    def made_with(self) -> str:
        """The setting that it is to be used with."""
        return f"data.size={self.size}"

    @property
    def notice(self) -> str:
        """As a text's Manifest."""
        return ""

    def __str__(self) -> str:
        shape = f"{self.size} × {self.size} × {self.channels}"
        return f"{self.source}: {self.counts['train']:,} training images of {shape}, {self.classes} classes"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`'s manifest; UserError where it is missing, damaged or of another version."""
        try:
            return cls.checked(from_json((folder / FILE).read_bytes()), FILE)
        except (OSError, ValueError) as error:
            raise _unusable(folder / FILE, error) from None


def write_split(folder: Path, name: str, pixels: np.ndarray, labels: np.ndarray) -> ImageSplit:
    """Write a split: uint8 (N, C, size, size), and classes (N,)."""
    sums = {}
    for what, array in (("pixels", pixels), ("labels", labels.astype(np.uint16))):
        path = folder / f"{name}-{what}.npy"
        np.save(path, np.ascontiguousarray(array), allow_pickle=False)
        sums[what] = _sha256(path)
    return ImageSplit(images=len(pixels), **sums)


class ImageData:
    """A folder of prepared images, mapped into memory; pickled as its path."""

    def __init__(self, path: Path, manifest: ImageManifest, arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.path = path
        self.manifest = manifest
        self.arrays = arrays  # of a split: uint8 (N, C, size, size) and uint16 (N,), read-only

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        """Map a folder's images; UserError where they are damaged.

        `verify` reads them all and checks SHA-256 and largest class; otherwise only types and shapes are checked.
        """
        manifest, arrays = ImageManifest.read(path), {}
        for name, split in manifest.splits.items():
            shape = split.images, manifest.channels, manifest.size, manifest.size
            pixels = _mapped(path / f"{name}-pixels.npy", np.uint8, shape, split.pixels if verify else None)
            labels = _mapped(path / f"{name}-labels.npy", np.uint16, shape[:1], split.labels if verify else None)
            if verify and labels.max() >= manifest.classes:
                raise _unusable(path, f"it holds class {labels.max()}, of {manifest.classes}")
            arrays[name] = pixels, labels
        return cls(path, manifest, arrays)

    def __reduce__(self) -> tuple:
        return partial(ImageData.open, verify=False), (self.path,)

    def check(self, spec: RunSpec) -> None:
        """Raise UserError where the images are not those that the spec's host takes."""
        host, own = spec.host, self.manifest
        asked = (host.image_size, host.image_channels) if isinstance(host, ResNetSpec) else None
        if asked != (own.size, own.channels):
            what = f"the images of {own.source} are {own.size} × {own.size} × {own.channels}"
            takes = "text" if asked is None else f"{asked[0]} × {asked[0]} × {asked[1]}"
            mend = f"set host.image_size={own.size} and host.image_channels={own.channels}"
            raise UserError(f"{what}, and the host takes {takes}: {mend}, or data.size to average them down.")

    def examples(self, split: Split, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images at `rows` (N,), by the training set's mean and deviation: float32 (N, C, size, size), int64 (N,).

        They go to the device as bytes.
        """
        pixels, labels = self.arrays[split]
        sent = torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows].astype(np.int64))
        if device.type == "cuda":
            sent = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in sent)
        mean, deviation = (
            torch.tensor(levels, device=device)[:, None, None]
            for levels in (self.manifest.mean, self.manifest.deviation)
        )
        return (sent[0].float() - mean) / deviation, sent[1]

    def batches(self, spec: RunSpec, seed: int, part: tuple[float, float], device: torch.device) -> ImageBatches:
        """Training batches of a spec's runs, from the `part` of the training images between two fractions."""
        self.check(spec)
        assert isinstance(spec.data, ImageSpec)  # as its host takes images
        examples = partial(self.examples, "train", device=device)
        return ImageBatches(spec.data, examples, self.manifest.counts["train"], seed, part)

    def held_out(self, n: int, spec: RunSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        """`n` examples evenly from all held-out ones."""
        return self.examples("valid", evenly(n, self.manifest.counts["valid"]), device)


def _mapped(path: Path, dtype: type, shape: tuple[int, ...], sha256: str | None) -> np.ndarray:
    """The array of a file, checked; a checksum of None is not."""
    try:
        if sha256 is not None and _sha256(path) != sha256:
            raise ValueError("its SHA-256 is not the manifest's")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if (array.dtype, array.shape) != (dtype, shape):
            raise ValueError(f"{array.shape} × {array.dtype}, not {shape} × {np.dtype(dtype)}")
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise _unusable(path, error) from None
    return array


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unusable(path: Path, how: object) -> UserError:
    how = str(how).removesuffix(".")
    return UserError(f"{path} cannot be used as prepared images ({how}): make its folder anew with `esper prepare`.")
