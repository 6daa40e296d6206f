"""The manifest: what a folder of shards holds, in numbers."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import from_json

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.workers.tolaria.data import tokenizer

VERSION = 1
FILE = "manifest.json"

Split = Literal["train", "valid"]


class Shard(Frozen):
    """One Arrow IPC file of consecutive tokens; its name is never a path."""

    file: str = Field(pattern=r"^(train|valid)-\d{5,9}\.arrow$")
    tokens: PositiveInt
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class SplitManifest(Frozen):
    """The counts of one split, and its shards in order.

    Tokens include one end per document; characters and bytes (of UTF-8) do not, so that bits per byte can be told.
    """

    documents: PositiveInt
    tokens: PositiveInt
    characters: NonNegativeInt
    bytes: NonNegativeInt
    unseen: NonNegativeInt = Field(description="characters that the tokenizer does not know")
    shards: tuple[Shard, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.tokens != (total := sum(shard.tokens for shard in self.shards)):
            raise ValueError(f"a split has {self.tokens} tokens, but its shards {total} together.")
        return self


class Manifest(Frozen):
    """What a folder of prepared shards holds: `manifest.json`."""

    version: Literal[1]
    source: str = Field(description="name of the source, or absolute path of the text")
    tokenizer: Annotated[str, AfterValidator(tokenizer.checked_name)]
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=2, le=2**31 - 1)
    valid_fraction: float = Field(gt=0, lt=1)
    max_bytes: PositiveInt | None
    splits: dict[Split, SplitManifest] = Field(min_length=2, description="`train` and `valid`")

    def fingerprint(self) -> str:
        """What tells these tokens from others, wherever they lie."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps([self.tokenizer_fingerprint, shards]).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`'s manifest.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        path = folder / FILE
        try:
            values = from_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} is no folder of prepared shards (no {FILE}): make one with `esper prepare`."
            ) from None
        except (OSError, ValueError) as error:
            raise damaged(path, f"cannot be read ({error})") from None
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise damaged(path, f"is of version {version!r} and this Esper reads version {VERSION}")
        return cls.checked(values, str(path))


def damaged(path: Path, how: str) -> UserError:
    """The error for a file of prepared shards that cannot be used."""
    return UserError(f"{path} {how}: delete {path.parent} and make it anew with `esper prepare`.")
