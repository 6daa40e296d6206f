"""Named random streams: a draw depends only on (seed, name, keys), never on earlier draws.

So grafts change no other stream, arms with one seed see equal batches, and resuming needs no generator state.
"""

import zlib

import numpy as np
import torch


def stream(seed: int, name: str, *keys: int) -> np.random.Generator:
    """The generator for purpose `name` (`data`, `init`, `graft`, `dropout`, `policy`) at `keys`, such as a step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), *keys])))


def derive(seed: int, name: str, *keys: int) -> int:
    """A 63-bit seed for purpose `name` at `keys`."""
    return int(stream(seed, name, *keys).integers(2**63))


def torch_stream(seed: int, name: str, *keys: int) -> torch.Generator:
    """`stream` as a CPU torch generator: weights drawn on the CPU are equal on every device."""
    return torch.Generator().manual_seed(derive(seed, name, *keys))
