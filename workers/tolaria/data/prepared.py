"""What all kinds of prepared data are: a folder of files and a manifest, mapped into memory that processes share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic_core import from_json

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec

FILE = "manifest.json"
STEPS_AT_ONCE = 256  # that are drawn for at once, as seeding costs more than drawing

Split = Literal["train", "valid"]


class BaseManifest(Frozen):
    """The content of `manifest.json`."""

    made_of: ClassVar[str]  # text or images

    @property
    def notice(self) -> str:
        """What a user should know of the data, if anything."""
        return ""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`'s manifest; UserError where it is missing, damaged or of another version."""
        with usable(folder / FILE, cls.made_of):
            return cls.checked(from_json((folder / FILE).read_bytes()), FILE)


class Prepared(ABC):
    """A folder of prepared data; pickled as its path. `arrays` are a split's, read-only."""

    def __init__(self, path: Path, manifest: Any, arrays: dict[str, Any]) -> None:
        self.path, self.manifest, self.arrays = path, manifest, arrays

    @classmethod
    @abstractmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        """Map a folder; UserError where it is damaged, of which `verify` makes sure: it reads all of it."""

    def __reduce__(self) -> tuple:
        return partial(type(self).open, verify=False), (self.path,)

    def check(self, spec: RunSpec) -> None:
        check_kind(self.path, self.manifest.made_of, spec.data.kind)


class Draws:
    """Random arrays that have a row per optimizer step, by seed and step alone: no cursor is saved."""

    def __init__(self, seed: int, name: str, draw: Callable[[np.random.Generator, int], Sequence[np.ndarray]]) -> None:
        self._seed, self._name, self._draw = seed, name, draw  # from a number of steps on: the arrays' rows
        self._block, self._drawn = -1, ()

    def at(self, optimizer_step: int) -> list[np.ndarray]:
        block, row = divmod(optimizer_step, STEPS_AT_ONCE)
        if block != self._block:
            random = stream(self._seed, self._name, block)
            self._block, self._drawn = block, self._draw(random, STEPS_AT_ONCE)
        return [array[row] for array in self._drawn]


def kind_of(folder: Path) -> str:
    """What `folder` was prepared as: images, or else text (damaged manifests too)."""
    try:
        values = from_json((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return "text"
    return "images" if isinstance(values, dict) and values.get("kind") == "images" else "text"


def check_kind(folder: Path, own: str, asked: str) -> None:
    """Raise UserError where data of one kind are asked for as another's."""
    if own != asked:
        what = f"{folder} holds prepared {own}, and the preset is for {asked}"
        raise UserError(f"{what}: name other data, or another --task or --preset.")


@contextmanager
def usable(path: Path, made_of: str) -> Iterator[None]:
    """Turn whatever a damaged file leads to into a sentence."""
    try:
        yield
    except Exception as error:  # of pydantic, pyarrow, numpy and the parser that it reads its headers by
        how = str(error).removesuffix(".")
        what = f"{path} cannot be used as prepared {made_of} ({how})"
        raise UserError(f"{what}: make its folder anew with `esper prepare`.") from None


def mapped(
    path: Path,
    made_of: str,
    sha256: str | None,
    read: Callable[[Path], np.ndarray],
    shape: tuple[int, ...],
    *types: Any,
) -> np.ndarray:
    """The array of a file, of this shape and one of these types; a checksum of None is not checked."""
    with usable(path, made_of):
        if sha256 is not None and digest(path) != sha256:
            raise ValueError("its SHA-256 is not the manifest's")
        array = read(path)
        if array.dtype not in types or array.shape != shape:
            raise ValueError(f"it holds {array.shape} × {array.dtype}, not {shape} × {np.dtype(types[0])}")
    return array


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def evenly(n: int, among: int) -> np.ndarray:
    """`n` of `range(among)`, or all of it, at equal distances: neighbours in a text tell much the same."""
    n = min(max(1, n), among)
    return np.arange(n) * among // n
