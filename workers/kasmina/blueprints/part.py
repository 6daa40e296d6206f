"""Parts (layers, experts): modules inserted and removed whole."""

from typing import Any

from torch import Tensor

from esper.platform.contracts import HostProtocol, HostShape, Swap
from esper.workers.kasmina.registry import Blueprint, Planted


class Part(Blueprint):
    """What every blueprint of a part shares."""

    units = 0

    def pruned(self, shape: HostShape, seed: Planted) -> HostShape:
        """Without the part."""
        return shape.without(seed.part)

    def outgoing(self, host: HostProtocol, seed: Planted) -> list[Tensor]:
        """The tensors through which the part writes to the stream."""
        return host.part(seed.part).outgoing()

    def fuse(self, host: HostProtocol, seed: Planted) -> list[Swap]:
        """No swaps: its tensors keep their own step counts."""
        return []

    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Swap], list[Any]]:
        """Take the module out."""
        return [], host.remove(seed.part)
