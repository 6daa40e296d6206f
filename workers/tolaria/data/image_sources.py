"""Sources of N images with C channels: digits of scikit-learn, CIFAR-10, `.npz` files; and what of them is held out."""

import hashlib
import io
import pickle
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esper.platform.errors import UserError, in_a_sentence
from esper.platform.seeding import stream
from esper.workers.tolaria.data.sources import Source, files_fingerprint, found, hub_answers, hub_rows

CIFAR10 = "uoft-cs/cifar10"
CLASSES = 2**16  # at most
FORMS = "an .npz file, a folder of CIFAR-10's python batches, or one that `esper prepare` made"
ODD = "cannot be read as images"
LAYOUT = "train_images (N, size, size[, channels]) of uint8 and train_labels (N,); the same of test, if any"


class Images(NamedTuple):
    """A split's images: uint8 (N, C, size, size), and their classes (N,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def at(self, rows: np.ndarray) -> "Images":
        return Images(self.pixels[rows], self.labels[rows])


Splits = tuple[Images, Images | None]  # training, held-out if the source has it


def digits() -> Splits:
    """1,797 handwritten digits of 8 × 8 grey pixels, which come with scikit-learn (UCI, 1998)."""
    from sklearn.datasets import load_digits  # seconds to import, and needed by this source alone

    found: Any = load_digits()
    return Images(np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None], found.target), None  # levels 0 to 16


def _cifar10() -> Splits:
    return _hub("train"), _hub("test")


def _hub(split: str) -> Images:
    rows = [(np.asarray(image), label) for image, label in hub_rows(CIFAR10, split, ["img", "label"], FORMS)]
    images, labels = zip(*rows, strict=True)
    return Images(_channels_first(np.stack(images)), np.array(labels))


SOURCES = (Source("digits", digits), Source("cifar10", _cifar10))


def find(source: str) -> Source[Splits]:
    """The source of this name, else the local file or folder; UserError where neither exists."""
    return found(source, SOURCES, _files)


def _files(path: Path) -> Source[Splits]:
    batches = sorted(path.glob("data_batch_*")) if path.is_dir() else []
    if batches:
        files, load = [*batches, *path.glob("test_batch")], partial(_python_batches, path)
    elif path.suffix == ".npz" and path.is_file():
        files, load = [path], partial(_npz, path)
    else:
        raise UserError(f"{path} holds no images: give {FORMS}.")
    return Source(str(path.resolve()), load, files_fingerprint(files))


def available(source: Source[Splits]) -> Source[Splits]:
    """`source`; UserError where it cannot be had now. No other has images of the same size to stand in for it."""
    if source.name == "cifar10" and not hub_answers(CIFAR10):
        what = "cifar10 needs the Hugging Face hub, which does not answer"
        raise UserError(f"{what}: connect, give --data {FORMS}, or take --task digits, which needs no network.")
    return source


def _npz(path: Path) -> Splits:
    """Arrays by name, nothing pickled; `train_jpeg` with `train_offsets` in place of images are JPEG files in a row."""
    mend = f"give an .npz file with {LAYOUT}"
    with in_a_sentence(f"{path} {ODD}", mend), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return _of_npz(arrays, "train"), _of_npz(arrays, "test") if "test_labels" in arrays else None


def _of_npz(arrays: Any, split: str) -> Images:
    if f"{split}_jpeg" in arrays:
        files, offsets = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offsets"].tolist()
        from PIL import Image  # of `datasets`; needed for such files alone

        parts = (files[start:end] for start, end in pairwise(offsets))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(part), formats=["JPEG"])) for part in parts])
    else:
        pixels = arrays[f"{split}_images"]
    return Images(_channels_first(pixels), arrays[f"{split}_labels"])


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """(N, size, size) or (N, size, size, C) → (N, C, size, size)."""
    if pixels.ndim not in (3, 4):
        raise ValueError(f"images of shape {pixels.shape}")
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays, and what has no class of its own: a pickle may name any function to be called while it is read."""

    def find_class(self, module: str, name: str) -> Any:
        constructors = {
            "multiarray._reconstruct": np.empty(0).__reduce__()[0],  # builtins, which no pickle can change
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
        }
        known = constructors.get(f"{module}.{name}".removeprefix("numpy.core.").removeprefix("numpy._core."))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return known


def _python_batches(folder: Path) -> Splits:
    """CIFAR-10's python version: pickles of Python 2, a row of `data` an image, channel by channel."""
    batches = [_python_batch(path) for path in sorted(folder.glob("data_batch_*"))]
    train = Images(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    test = folder / "test_batch"
    return train, _python_batch(test) if test.exists() else None


def _python_batch(path: Path) -> Images:
    with in_a_sentence(f"{path} {ODD}", "unpack the python version of CIFAR-10 anew"), path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
        return Images(batch[b"data"].reshape(-1, 3, 32, 32), np.array(batch[b"labels"]))


def split(
    source: Source[Splits], valid_fraction: float, max_images: int | None, size: int | None
) -> tuple[int, Images, Images]:
    """Number of classes, training images (`max_images` at most) and held-out ones, averaged down to `size`.

    Both are in a fixed random order: of classes in turn, evenly picked images would be of a few classes only. Where the
    source has no split the images with the smallest hashes are held out, so that equal ones stay together.
    """
    train, held = source.load()
    for images in filter(None, (train, held)):
        _check(source.name, images)
    classes = len(np.unique(train.labels))
    if classes < 2 or (top := max(int(each.labels.max()) for each in (train, held) if each is not None)) >= classes:
        what = f"{source.name} has {classes} classes in training, and labels up to {top if classes > 1 else 0}"
        raise UserError(f"{what}: number two classes or more from 0 on, each with a training image.")
    if held is None:
        hashes = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in train.pixels])
        chosen = hashes <= np.sort(hashes)[int(valid_fraction * len(hashes))]
        train, held = train.at(~chosen), train.at(chosen)
    elif held.pixels.shape[1:] != train.pixels.shape[1:]:
        shapes = " and ".join(_shape(images) for images in (train, held))
        raise UserError(f"{source.name} has training and test images of {shapes}: give images of one size.")
    if not len(train.labels):
        what = f"of the {len(held.labels):,} images of {source.name} all are held out"
        raise UserError(f"{what}: give others beside them.")
    orders = (stream(0, "images", i).permutation(len(images.labels)) for i, images in enumerate((train, held)))
    train, held = train.at(next(orders)[:max_images]), held.at(next(orders))
    return classes, _averaged(source.name, train, size), _averaged(source.name, held, size)


def _check(name: str, images: Images) -> None:
    """UserError where a split's arrays are no images and classes."""
    pixels, labels = images
    if pixels.dtype != np.uint8:
        raise UserError(f"the images of {name} are {pixels.dtype}: give them as uint8, 0 to 255.")
    if pixels.shape[1] not in (1, 3) or pixels.shape[2] != pixels.shape[3] or not pixels.size:
        raise UserError(f"the images of {name} are {_shape(images)}: they must be square, in 1 or 3 channels.")
    if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        what = f"{name} has {labels.dtype} labels of shape {labels.shape} for {len(pixels):,} images"
        raise UserError(f"{what}: give one whole number an image.")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise UserError(f"{name} has labels from {labels.min()} to {labels.max()}: number the classes from 0 on.")


def _shape(images: Images) -> str:
    channels, height, width = images.pixels.shape[1:]
    return f"{height} × {width} × {channels}"


def _averaged(name: str, images: Images, size: int | None) -> Images:
    n, channels, own, _ = images.pixels.shape
    if size is None or size == own:
        return images
    if own % size:
        raise UserError(f"data.size is {size}, but the images of {name} are {own} pixels wide: take a divisor of that.")
    tiles = images.pixels.reshape(n, channels, size, own // size, size, own // size)
    return Images(np.rint(tiles.mean(axis=(3, 5))).astype(np.uint8), images.labels)
