"""Fits the reference clock to wall seconds of optimizer steps at several shapes, on an idle device.

seconds = base + layer·depth + FLOPs/rate      (non-negative least squares over relative errors)
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from esper.platform.clock import ClockSpec
from esper.platform.console import say
from esper.platform.contracts import Instance
from esper.platform.spec import RunSpec
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.observe import batch_tokens
from esper.workers.tolaria.data import Data
from esper.workers.tolaria.trainer import Trainer, synchronize

BURN_IN = 5  # steps left out: allocator, caches, lazy initialisation


# Of each shape timed: FLOPs of an optimizer step; its median seconds, and by the formula; (predicted − wall) / wall.
COLUMNS = ("layers", "width", "flops", "wall", "predicted", "error")


def calibrate(spec: RunSpec, data: Data, *, steps: int) -> tuple[ClockSpec, list[dict[str, float]]]:
    """Fit this device's clock for the spec's batches; shapes take turns, so speed drift affects all alike."""
    width, deepest = spec.host.own_width, spec.growth.max_layers
    shapes = [(n, factor * width) for n in sorted({1, 2, (1 + deepest) // 2, deepest}) for factor in (1, 2)]
    trainers = [_born(spec, data, *shape) for shape in shapes]
    say(f"calibrate: {steps + BURN_IN} rounds over {len(trainers)} shapes")
    wall = np.median(_rounds(trainers, steps), axis=0)
    flops = batch_tokens(spec) * np.array([trainer.host.shape.flops_per_token() for trainer in trainers], float)
    design = np.stack([np.ones(len(shapes)), [n for n, _ in shapes], flops], axis=1)
    scale = (design / wall[:, None]).max(axis=0)
    base, layer, flop = nnls(design / wall[:, None] / scale, np.ones(len(shapes)))[0] / scale
    predicted = design @ [base, layer, flop]
    clock = ClockSpec(
        kind=spec.clock.kind,
        base_seconds=float(base),
        layer_seconds=float(layer),
        flops_per_second=float(1 / max(flop, 1e-18)),
        **_growth_costs(spec, data, steps),
        measured_on=f"{trainers[0].device.type}, {spec.threads} thread(s), {spec.dtype}, `esper calibrate`",
    )
    columns = (*zip(*shapes, strict=True), *map(np.ndarray.tolist, (flops, wall, predicted, predicted / wall - 1)))
    return clock, [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]


def _growth_costs(spec: RunSpec, data: Data, steps: int) -> dict[str, float]:
    """Seconds of a graft of units, and of a gated part per layer against a host born without."""
    grown, plain, gated = (_born(spec, data) for _ in range(3))
    grafts = []
    for site in plain.host.shape.injection_specs():
        of = [grown.kasmina.blueprints[name] for name in site.blueprints]
        grafts += [_timed(grown, grown.kasmina.graft, site.id, each.name) for each in of if each.units]
        for each in of:
            if each.adds == "expert":
                gated.kasmina.graft(site.id, each.name)
    extra = float(np.median(np.subtract(*_rounds([gated, plain], steps).T)))
    return {"graft_seconds": median(grafts), "expert_seconds": max(0.0, extra / gated.host.shape.experts())}


def _born(spec: RunSpec, data: Data, n_layer: int | None = None, width: int | None = None) -> Trainer:
    host = spec.host
    if n_layer and width:
        layers = host.alike(n_layer, width, host.own_heads)
        host = host.model_copy(update={"n_layer": n_layer, "layers": layers})
    sized = spec.model_copy(update={"host": host})
    return Trainer(sized, data, make_blueprints(None), 0, Instance())


def _rounds(trainers: Sequence[Trainer], steps: int) -> np.ndarray:
    """Seconds of each trainer's steps, taken in turn, float64 (steps, trainers)."""
    rounds = [[_timed(trainer, trainer.step, 1e-4) for trainer in trainers] for _ in range(steps + BURN_IN)]
    return np.array(rounds[BURN_IN:])


def _timed(trainer: Trainer, work: Callable[..., object], *arguments: Any) -> float:
    begun = time.perf_counter()
    work(*arguments)
    synchronize(trainer.device)
    return time.perf_counter() - begun
