"""Candidates: every action at a shape and the shape it leads to, from the blueprint registry."""

from collections.abc import Iterable
from typing import NamedTuple

from esper.platform.contracts import HostShape
from esper.platform.spec import RunSpec
from esper.platform.telemetry import WAIT, Candidate, TelemetrySpace
from esper.workers.kasmina.registry import Blueprint, Planted, make_blueprints
from esper.workers.tolaria.hosts import start_shape


class Option(NamedTuple):
    """A candidate and what it leads to."""

    candidate: Candidate
    site: int  # index of its site among the shape's; −1 for WAIT
    adds: str  # one of `telemetry.GROWTH_KINDS`; empty for WAIT
    after: HostShape | None  # the shape it leads to; None where the blueprint's own limit forbids it


def options(shape: HostShape, blueprints: Iterable[Blueprint], newest: Iterable[Planted] = ()) -> tuple[Option, ...]:
    """WAIT, then per site from input to output each accepted blueprint and the prune of the newest seed."""
    found = [Option(WAIT, -1, "", shape)]
    seeds = {seed.site: seed for seed in newest}
    by_name = {blueprint.name: blueprint for blueprint in blueprints}
    for i, site in enumerate(shape.injection_specs()):
        for blueprint in by_name.values():
            if blueprint.name in site.blueprints:
                after = blueprint.resized(shape, site.id) if blueprint.allowed(shape, site.id) else None
                found.append(Option(Candidate("graft", site.id, blueprint.name), i, blueprint.adds, after))
        if seed := seeds.get(site.id):
            blueprint = by_name[seed.blueprint]
            after = blueprint.pruned(shape, seed)
            found.append(Option(Candidate("prune", site.id, seed.blueprint), i, blueprint.adds, after))
    return tuple(found)


def within_caps(shape: HostShape, max_layers: int, max_parameters: int | None) -> bool:
    """Whether `GrowthSpec`'s caps allow this shape."""
    return shape.depth() <= max_layers and (max_parameters is None or shape.parameters_count() <= max_parameters)


def telemetry_space(spec: RunSpec) -> TelemetrySpace:
    """A spec's fixed telemetry sizes: those of its deepest shape, with a prune row per site."""
    blueprints = make_blueprints(spec.growth.blueprints).values()
    deepest = start_shape(spec, vocab_size=1).deepened(spec.growth.max_layers)  # the vocabulary changes no count
    sites = len(deepest.injection_specs())
    return TelemetrySpace(sites=sites, candidates=len(options(deepest, blueprints)) + sites)
