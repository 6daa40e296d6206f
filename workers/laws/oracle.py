"""The oracle's bound: the lowest final loss that a surrogate instance allows, by dynamic programming.

    L[k + 1, c] = min( trained(L[k, c], a slice),  min over blueprints b: trained(L[k, c − b], a slice less b's cost) )

Exact: law and costs depend on a shape's *class* (its layers, heads, neurons, experts) only, and a lower loss stays
lower. The spread of units over sites leaves the limits' sum unchanged, hence also legality. Prunes never pay.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np

from esper.platform.budget import DecisionClock
from esper.platform.contracts import Instance
from esper.platform.spec import RunSpec
from esper.workers.candidates import within_caps
from esper.workers.kasmina.registry import Blueprint, make_blueprints
from esper.workers.laws.scaling_law import CONTINUOUS, VOCABULARY, ScalingLaw, Size, start_of, whole_steps
from esper.workers.observe import SEGMENTS, batch_tokens

NONE = -1


@dataclass(frozen=True)
class Classes:
    """The C classes that grafts of B blueprints reach from the start, class 0."""

    blueprints: tuple[str, ...]
    size: Size  # arrays (C,)
    tokens_per_unit: np.ndarray  # tokens that one unit of the budget's axis buys, float64 (C,)
    graft_cost: np.ndarray  # of a graft that leads here, on the budget's axis, float64 (C,)
    axis_per_step: np.ndarray  # a step's cost after a graft into a class, for legality, float64 (B, C)
    source: np.ndarray  # class before a blueprint's graft into this one, or NONE, int64 (B, C)
    target: np.ndarray  # class after a blueprint's graft in this one, or NONE, int64 (B, C)


def classes(spec: RunSpec, n_layer: int) -> Classes:
    """The classes of a spec's runs that start with `n_layer` layers."""
    part = spec.model_dump_json(include={"host", "data", "optimizer", "clock", "budget", "growth"})
    return _classes(part, n_layer)


@lru_cache(maxsize=64)
def _classes(part: str, n_layer: int) -> Classes:
    spec = RunSpec.model_validate_json(part)
    blueprints = make_blueprints(spec.growth.blueprints)
    shapes: list[Any] = [start_of(spec, n_layer)]
    number, depth = {_totals(shapes[0]): 0}, [0]  # of each class, and the grafts that lead to it
    most = sum(_slices(spec, Instance())[1] < spec.optimizer.decay_from)  # one graft a decision
    edges: list[tuple[int, int, int]] = []  # (blueprint, class before, class after)
    for here, shape in enumerate(shapes):  # which grows on the way
        for b, blueprint in enumerate(blueprints.values() if depth[here] < most else ()):
            after = _grown(shape, blueprint)
            if after is not None and within_caps(after, spec.growth.max_layers, spec.growth.max_parameters):
                there = number.setdefault(_totals(after), len(shapes))
                if there == len(shapes):
                    shapes.append(after)
                    depth.append(depth[here] + 1)
                edges.append((b, here, there))
    source = np.full((len(blueprints), len(shapes)), NONE)
    target = source.copy()
    for b, here, there in edges:
        source[b, there], target[b, here] = here, there
    axis, tokens = spec.budget.axis, batch_tokens(spec)

    def per_step(split: bool) -> np.ndarray:
        return np.array([spec.clock.axis_per_step(axis, shape, tokens, split=split) for shape in shapes])

    cost = {"parameter_seconds": [shape.parameters_count() for shape in shapes], "seconds": [1] * len(shapes)}
    return Classes(
        blueprints=tuple(blueprints),
        size=Size.of_all(shapes),
        tokens_per_unit=tokens / per_step(split=False),
        graft_cost=spec.clock.graft_seconds * np.array(cost.get(axis, [0] * len(shapes)), float),
        axis_per_step=np.array([per_step(split=blueprint.adds in SEGMENTS) for blueprint in blueprints.values()]),
        source=source,
        target=target,
    )


def _grown(shape: Any, blueprint: Blueprint) -> Any:
    sites = (site for site in shape.injection_specs() if blueprint.name in site.blueprints)
    return next((blueprint.resized(shape, site.id) for site in sites if blueprint.allowed(shape, site.id)), None)


def _totals(shape: Any) -> tuple[int, int, int, int]:
    layers = shape.layers
    return len(layers), sum(layer.heads for layer in layers), sum(layer.width for layer in layers), shape.experts()


def _slices(spec: RunSpec, instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """Amount used at each decision and the end, float64 (K + 1,), and the budget fraction, float64 (K,)."""
    clock = DecisionClock(spec.budget.amount * instance.budget, spec.budget.decisions)
    if spec.budget.axis in CONTINUOUS:
        passed = np.arange(clock.decisions + 1)
        return passed * clock.slice, passed[:-1] / clock.decisions
    unit = 1 if spec.budget.axis == "steps" else batch_tokens(spec)
    readings = [0]
    while not clock.spent:
        readings.append(readings[-1] + unit * whole_steps(clock.boundary - readings[-1], unit))
        clock.advance(readings[-1])
    used = np.array(readings, float)
    return used, used[:-1] / clock.amount


@dataclass(frozen=True)
class Course:
    """What actions do not change of an instance's episodes: K decisions, C classes, B blueprints."""

    classes: Classes
    law: ScalingLaw
    size_loss: np.ndarray  # nats, float64 (C,)
    used: np.ndarray  # on the budget's axis at each decision and at the end, float64 (K + 1,)
    fractions: np.ndarray  # of the budget at each decision, float64 (K,)
    growing: np.ndarray  # before the rate's decay, bool (K,)
    legal: np.ndarray  # whether a blueprint's graft into a class is legal before the decay, bool (B, C)
    spans: np.ndarray  # decisions until a graft into a class is paid, int64 (C,)

    @classmethod
    def of(cls, spec: RunSpec, instance: Instance, seed: int = 0) -> Self:
        """The course of an instance; `seed` draws the law where it names none."""
        known = classes(spec, instance.n_layer or spec.host.n_layer)
        law = ScalingLaw.drawn(seed if instance.law is None else instance.law, spec)
        used, fractions = _slices(spec, instance)
        steps = spec.budget.amount * instance.budget / spec.budget.decisions / known.axis_per_step
        return cls(
            classes=known,
            law=law,
            size_loss=law.size_loss(known.size),
            used=used,
            fractions=fractions,
            growing=fractions < spec.optimizer.decay_from,
            legal=(known.source != NONE) & (steps >= spec.growth.min_optimizer_steps),
            spans=np.maximum(1, np.ceil(known.graft_cost / used[1] - 1e-9)).astype(int),
        )


def bound(spec: RunSpec, instance: Instance, seed: int = 0) -> float:
    """The lowest final loss, nats per token, that any controller can reach; `seed` as for `Course.of`."""
    course = Course.of(spec, instance, seed)
    known, last = course.classes, len(course.growing)
    best = np.full((last + 1, len(course.size_loss)), np.inf)
    best[0, 0] = np.log(VOCABULARY)
    for k in range(last):
        moves = [(np.arange(best.shape[1]), np.ones(best.shape[1], bool), 1, 0.0)]  # waiting, from each class to itself
        if course.growing[k]:
            moves += [(s, ok, course.spans, known.graft_cost) for s, ok in zip(known.source, course.legal, strict=True)]
        for source, legal, spans, cost in moves:
            ends = np.minimum(last, k + spans)
            to = np.flatnonzero(legal & np.isfinite(best[k, source]))
            tokens = np.maximum(0.0, course.used[ends] - course.used[k] - cost) * known.tokens_per_unit
            after = course.law.trained(best[k, source[to]], course.size_loss[to], tokens[to])
            ends = np.broadcast_to(ends, best.shape[1])[to]
            best[ends, to] = np.minimum(best[ends, to], after)
    return float(best[last].min())
