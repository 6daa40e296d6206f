"""Text in, Arrow files of token ids out, mapped into memory by every worker."""

from pathlib import Path

from esper.workers.tolaria.data.build import ensure, prepare
from esper.workers.tolaria.data.shards import Manifest, TokenData
from esper.workers.tolaria.data.tokenizer import Tokenizer

__all__ = ["Data", "Manifest", "TokenData", "Tokenizer", "ensure", "open_data", "prepare"]

Data = TokenData  # any kind of prepared data


def open_data(path: Path, *, verify: bool = True) -> Data:
    """Prepared data of any kind; UserError where it is damaged, of which `verify` makes sure."""
    return TokenData.open(path, verify=verify)
