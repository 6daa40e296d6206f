"""Named streams of random numbers: one seed for a run, an independent stream for each purpose.

A draw depends only on (seed, name, keys), never on how many draws came before it. So grafting changes no other
stream, two arms with the same seed see the same batches, and a resumed run needs no generator state.
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
    """`stream` as a CPU torch generator: weights are drawn on the CPU, so that every device starts equal."""
    return torch.Generator().manual_seed(derive(seed, name, *keys))
