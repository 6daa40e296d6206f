"""Text in, Arrow files of token ids out, mapped into memory by every worker."""

from esper.workers.tolaria.data.build import ensure, prepare
from esper.workers.tolaria.data.shards import Manifest, TokenData
from esper.workers.tolaria.data.tokenizer import Tokenizer

__all__ = ["Manifest", "TokenData", "Tokenizer", "ensure", "prepare"]
