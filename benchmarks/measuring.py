"""What the benchmarks share: a row of their table, a text that is there without a network, timing in turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from esper.platform.contracts import Instance
from esper.platform.spec import RunSpec
from esper.workers.kasmina.registry import blueprints_of
from esper.workers.tolaria.data import Data, TokenData, ensure
from esper.workers.tolaria.trainer import Trainer

Row = tuple[str, str, str]  # what is measured, goal, now

BURN_IN = 3  # steps; a compiler compiles in them
BLOCKS = 7  # of each contender's steps that are timed
RATE = 1e-4  # learning rate: speed does not depend on it


def text(spec: RunSpec) -> TokenData:
    """The documentation of this Python, as the spec's tokens."""
    return TokenData.open(ensure(spec.data.model_copy(update={"source": "python-docs"})))


def trainer(spec: RunSpec, data: Data) -> Trainer:
    """A trainer of a new host with all blueprints that the spec names."""
    return Trainer(spec, data, blueprints_of(spec.growth), 0, Instance())


def bound(each: Trainer) -> Trainer:
    """The trainer, whose steps are compiled ones from now on; the first call for a shape waits for their build."""
    each.step(RATE)
    package = each.package()
    while package is not None and package.building():
        time.sleep(0.1)
    if package is not None:
        each.bind(package)
    if not each.bound:
        raise RuntimeError(f"no compiled step: {package.failure.read_text() if package else 'not of this spec'}")
    return each


def in_turns(works: Mapping[str, Callable[[], object]], steps: int) -> dict[str, list[float]]:
    """Name → seconds of a step in each block. All take turns, so what else the machine does slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for block in range(-1, BLOCKS):
        for name in list(works) if block % 2 else list(works)[::-1]:
            begun = time.perf_counter()
            for _ in range(BURN_IN if block < 0 else steps):
                works[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - begun) / steps)
    return {name: blocks[1:] for name, blocks in seconds.items()}


def times(ours: Sequence[float], other: Sequence[float]) -> str:
    """Our time over the other's: median and range over 7 blocks, which covers the true median with 98 % (sign test)."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    return f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
