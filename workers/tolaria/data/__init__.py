"""Text in, Arrow files of token ids out; images in, files of pixels out: mapped into memory by every worker."""

from esper.workers.tolaria.data.build import Data, ensure, open_data, prepare
from esper.workers.tolaria.data.images import ImageData
from esper.workers.tolaria.data.shards import Manifest, TokenData
from esper.workers.tolaria.data.tokenizer import Tokenizer

__all__ = ["Data", "ImageData", "Manifest", "TokenData", "Tokenizer", "ensure", "open_data", "prepare"]
