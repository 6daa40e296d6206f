"""Fitting the reference clock: wall seconds of real optimizer steps at several shapes, on an idle device.

    seconds = base + layer·depth + FLOPs/rate      (non-negative least squares over relative errors)

then the factor while segments are separate, and the seconds of an expert, of a graft and of fusing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from esper.platform.clock import ClockSpec
from esper.platform.console import say
from esper.platform.contracts import Instance
from esper.platform.spec import RunSpec
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.observe import batch_tokens
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.device import synchronize
from esper.workers.tolaria.trainer import Trainer

BURN_IN = 5  # steps not counted: allocator, caches, lazy initialisation


@dataclass(frozen=True)
class Measurement:
    """One shape, timed.

    Attributes:
        layers: depth.
        mlp_width: neurons of each MLP.
        flops: of an optimizer step.
        wall: median seconds of a step.
        predicted: seconds that the fitted formula gives.
    """

    layers: int
    mlp_width: int
    flops: float
    wall: float
    predicted: float = 0.0

    @property
    def error(self) -> float:
        """(predicted − wall) / wall."""
        return self.predicted / self.wall - 1


def calibrate(spec: RunSpec, data: TokenData, *, steps: int = 40) -> tuple[ClockSpec, list[Measurement]]:
    """The fitted clock of this device for this spec's batches, and the shapes it was fitted to.

    Sizes run from one layer to the spec's deepest, with the spec's MLP and with one twice as wide; the passes over
    them are interleaved, so that a drift of the machine's speed does not pass for a difference of shapes.
    """
    trainers, keys = [], []
    for layers in sorted({1, 2, (1 + spec.growth.max_layers) // 2, spec.growth.max_layers}):
        for factor in (1, 2):
            width = factor * (spec.host.mlp_width or 4 * spec.host.n_embd)
            host = spec.host.model_copy(update={"n_layer": layers, "mlp_width": width})
            sized = spec.model_copy(update={"host": host})
            trainers.append(Trainer(sized, data, make_blueprints(spec.growth.blueprints), 0, Instance()))
            keys.append((layers, width))
    times: list[list[float]] = [[] for _ in trainers]
    for i in range(steps + BURN_IN):
        for trainer, taken in zip(trainers, times, strict=True):
            taken.append(_timed_step(trainer))
        if i % 10 == 9:
            say(f"calibrate: {i + 1} of {steps + BURN_IN} rounds over {len(trainers)} shapes")
    tokens = batch_tokens(spec)
    rows = [
        Measurement(layers, width, tokens * trainer.host.flops_per_token(), statistics.median(taken[BURN_IN:]))
        for (layers, width), trainer, taken in zip(keys, trainers, times, strict=True)
    ]
    wall = np.array([row.wall for row in rows])
    design = np.array([[1.0, row.layers, row.flops] for row in rows]) / wall[:, None]
    scale = design.max(axis=0)
    base, layer, per_flop = nnls(design / scale, np.ones(len(rows)))[0] / scale
    costs = _growth_costs(spec, data, steps)
    clock = ClockSpec(
        kind=spec.clock.kind,
        base_seconds=float(base),
        layer_seconds=float(layer),
        flops_per_second=float(1 / max(per_flop, 1e-18)),
        expert_seconds=costs.expert,
        split_factor=costs.split,
        graft_seconds=costs.graft,
        fuse_seconds=costs.fuse,
        measured_on=f"{trainers[0].device.type}, {spec.threads} thread(s), {spec.dtype}, `esper calibrate`",
    )
    predicted = design * wall[:, None] @ np.array([base, layer, per_flop])
    return clock, [
        Measurement(row.layers, row.mlp_width, row.flops, row.wall, float(p))
        for row, p in zip(rows, predicted, strict=True)
    ]


@dataclass(frozen=True)
class _GrowthCosts:
    """Factor of a step while segments are separate; seconds of a graft, of fusing a seed, of an expert in a step."""

    split: float
    graft: float
    fuse: float
    expert: float


def _growth_costs(spec: RunSpec, data: TokenData, steps: int) -> _GrowthCosts:
    """A young seed of units at every site that takes one, and an expert a layer, each against a host born without."""
    blueprints = make_blueprints(None)
    grown = Trainer(spec, data, blueprints, 0, Instance())
    grafts = []
    for site in grown.host.injection_specs():
        for name in site.blueprints:
            if blueprints[name].units:
                grafts.append(_timed(grown, lambda site=site, name=name: grown.kasmina.graft(site.id, name)))
    layer = grown.host.shape.layers[0]
    head_dim = spec.host.head_dim or spec.host.n_embd // spec.host.n_head
    host = spec.host.model_copy(update={"n_head": layer.heads, "head_dim": head_dim, "mlp_width": layer.width})
    born = Trainer(spec.model_copy(update={"host": host}), data, blueprints, 0, Instance())
    split = statistics.median(first / second for first, second in _paired_steps(grown, born, steps))
    fuses = [_timed(grown, lambda seed=seed: grown.kasmina.fuse(seed)) for seed in grown.kasmina.seeds]

    gated, plain = (Trainer(spec, data, blueprints, 0, Instance()) for _ in range(2))
    for site in gated.host.injection_specs():
        if site.kind == "post_ffn":
            gated.kasmina.graft(site.id, "expert")
    extra = statistics.median(first - second for first, second in _paired_steps(gated, plain, steps))
    return _GrowthCosts(
        split=max(1.0, split),
        graft=statistics.median(grafts),
        fuse=statistics.median(fuses),
        expert=max(0.0, extra / gated.host.experts()),
    )


def _paired_steps(a: Trainer, b: Trainer, steps: int) -> list[tuple[float, float]]:
    """Seconds of a step of each, in turn."""
    return [(_timed_step(a), _timed_step(b)) for _ in range(steps + BURN_IN)][BURN_IN:]


def _timed_step(trainer: Trainer) -> float:
    return _timed(trainer, lambda: trainer.step(1e-4))


def _timed(trainer: Trainer, work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    synchronize(trainer.device)
    return time.perf_counter() - begun
