"""The settings of each kind of data."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from esper.platform.frozen import Count, Frozen, Share, by_kind


class DataSpec(Frozen):
    """Text and batches."""

    unit: ClassVar[str] = "token"  # what losses are a mean over, and ledgers count
    classifies: ClassVar[bool] = False  # whether accuracy, the share of targets foretold, is told beside the loss

    kind: Literal["text"] = "text"  # for a transformer
    source: str = "tinystories"  # a source name, a text file, a folder of them, or prepared shards
    tokenizer: str = "char"  # char, bpe:N or gpt2
    batch_size: Annotated[int, Field(ge=1, le=2**14)] = 16  # sequences in a batch
    eval_tokens: Annotated[int, Field(ge=64, le=2**26)] = 65536  # of the held-out set that final losses are taken on
    decision_tokens: Annotated[int, Field(ge=64, le=2**26)] = 8192  # of these, that the loss at a decision is taken on
    valid_fraction: Share = 0.1  # held out where the source has no split
    max_bytes: Count | None = None  # cap on the training text, in bytes

    @property
    def held_out_tokens(self) -> tuple[int, int]:
        """On which final losses are taken, and those at decisions."""
        return self.eval_tokens, self.decision_tokens

    @property
    def encoding(self) -> str:
        return self.tokenizer


class ImageSpec(Frozen):
    """Images, their classes, and batches. An image counts as one token."""

    unit: ClassVar[str] = "image"
    classifies: ClassVar[bool] = True
    encoding: ClassVar[str] = "images"

    kind: Literal["images"] = "images"  # for a ResNet
    source: str = "digits"  # a source name, an .npz file, a folder of CIFAR-10's python batches, or prepared images
    size: Annotated[int, Field(ge=1, le=2**11)] | None = None  # pixels a side, averaged down to; none: as they come
    batch_size: Annotated[int, Field(ge=1, le=2**14)] = 32  # images in a batch
    crop: Annotated[int, Field(ge=0, le=2**8)] = 0  # pixels that training images are shifted by at most
    flip: bool = False  # mirror half of the training images, left to right
    eval_images: Annotated[int, Field(ge=1, le=2**20)] = 10_000  # of the held-out set that final losses are taken on
    decision_images: Annotated[int, Field(ge=1, le=2**20)] = 1000  # of these, that the loss at a decision is taken on
    valid_fraction: Share = 0.2  # held out where the source has no split
    max_images: Count | None = None  # cap on the training images

    @property
    def held_out_tokens(self) -> tuple[int, int]:
        return self.eval_images, self.decision_images


Data = Annotated[DataSpec | ImageSpec, by_kind(DataSpec, ImageSpec)]
