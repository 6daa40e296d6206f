"""Parts (layers, experts): modules of their own, put in and taken out whole."""

from typing import Any

from torch import Tensor

from esper.platform.contracts import HostProtocol, HostShape, Swap
from esper.workers.kasmina.registry import PlantedSeed


class Part:
    """What every blueprint of a part shares."""

    units = 0

    def outgoing(self, host: HostProtocol, seed: PlantedSeed) -> list[Tensor]:
        """Every tensor through which the part writes to the stream."""
        return host.part(seed.part).outgoing()

    def fuse(self, host: HostProtocol, seed: PlantedSeed) -> list[Swap]:
        """Nothing is joined: its tensors stay what they are, with their own step counts."""
        return []

    def prune(self, host: HostProtocol, seed: PlantedSeed) -> tuple[list[Swap], list[Any]]:
        """Take the module out."""
        return [], host.remove(seed.part)

    def pruned(self, shape: HostShape, seed: PlantedSeed) -> HostShape:
        """The shape without the part."""
        return shape.without(seed.part)
