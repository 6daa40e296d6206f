"""The blueprints, one file each; importing this package registers them."""

from esper.workers.kasmina.blueprints.attention import AttentionSeed
from esper.workers.kasmina.blueprints.block import ResidualSeed
from esper.workers.kasmina.blueprints.expert import ExpertSeed
from esper.workers.kasmina.blueprints.ffn import FFNSeed

__all__ = ["AttentionSeed", "ExpertSeed", "FFNSeed", "ResidualSeed"]
