"""Text in, Arrow shards of token ids out, mapped into memory by every worker."""

from esper.workers.tolaria.data.build import ensure, prepare
from esper.workers.tolaria.data.manifest import Manifest, Shard, SplitManifest
from esper.workers.tolaria.data.shards import TokenData, TokenSplit
from esper.workers.tolaria.data.tokenizer import Tokenizer

__all__ = ["Manifest", "Shard", "SplitManifest", "TokenData", "TokenSplit", "Tokenizer", "ensure", "prepare"]
