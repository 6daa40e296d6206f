"""The manifest: what a folder of shards holds, in numbers."""

import hashlib
import json
from pathlib import Path

from pydantic import Field

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen

VERSION = 1
FILE = "manifest.json"


class Shard(Frozen):
    """One Arrow IPC file of consecutive tokens."""

    file: str
    tokens: int = Field(ge=1)
    sha256: str


class SplitManifest(Frozen):
    """The counts of one split, and its shards in order.

    Tokens include one end per document; characters and bytes (of UTF-8) do not, so that bits per byte can be told.
    """

    documents: int
    tokens: int
    characters: int
    bytes: int
    unseen: int = Field(description="characters that the tokenizer does not know")
    shards: tuple[Shard, ...] = Field(min_length=1)


class Manifest(Frozen):
    """What a folder of prepared shards holds: `manifest.json`."""

    version: int
    source: str = Field(description="name of the source, or absolute path of the text")
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    valid_fraction: float
    max_bytes: int | None
    splits: dict[str, SplitManifest] = Field(description="`train` and `valid`")

    def fingerprint(self) -> str:
        """What tells these tokens from others, wherever they lie."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps([self.tokenizer_fingerprint, shards]).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `folder`'s manifest.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        path = folder / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
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
