"""The blueprints, one file each; importing this package registers them."""

from esper.workers.kasmina.blueprints import attention, block, expert, ffn

__all__ = ["attention", "block", "expert", "ffn"]
