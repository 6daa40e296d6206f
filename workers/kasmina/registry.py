"""The registry of blueprints, from which candidates, mask, costs and padded sizes are derived.

A blueprint (a growth operator) is a frozen dataclass whose fields are its settings in `RunSpec.growth.blueprints`.
To add one, write a class in `blueprints/`, or in a plug-in, and decorate it with `@register`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, TypeAdapter, ValidationError

from esper.platform import plugins
from esper.platform.contracts import HostProtocol, HostShape, Resized, SiteKind
from esper.platform.errors import UserError, unknown
from esper.platform.spec import GrowthSpec
from esper.platform.telemetry import GROWTH_KINDS, SITE_COLUMN
from esper.workers.kasmina.slices import Slice

Count = Annotated[int, Field(ge=1, le=2**20, strict=True)]  # a setting that counts something
Grafted = tuple[str, list[Resized], list[tuple[Any, Any]]]
Natural = Annotated[int, Field(ge=0, le=2**53)]  # a count in a saved state


@dataclass(frozen=True)
class Planted:
    """A seed on a host, as its blueprint sees it."""

    site: str  # where it was grafted
    blueprint: str
    units: int  # heads or neurons that it added; 0 for a part
    part: str  # the host's name of the part (a layer, an expert) that it is; empty for units


class Blueprint(ABC):
    """The interface of every blueprint."""

    name: ClassVar[str]  # as actions, specs and records call it
    site_kind: ClassVar[SiteKind]  # at which it grows
    adds: ClassVar[str]  # one of `telemetry.GROWTH_KINDS`
    units: int  # that a graft adds; 0 where it adds a part

    def patience(self, host: HostProtocol, site_id: str) -> int:
        """How many times the usual warm-up a seed needs at a site of this host."""
        return 1

    # Whether the site may take one more of these.
    @abstractmethod
    def allowed(self, shape: HostShape, site_id: str) -> bool: ...
    # The shape after one more graft; its cost is the difference of the two shapes' closed forms.
    @abstractmethod
    def resized(self, shape: Any, site_id: str) -> HostShape: ...
    @abstractmethod
    def pruned(self, shape: Any, seed: Planted) -> HostShape: ...  # the shape without a seed

    def planted(self, shape: Any, site_id: str) -> tuple[HostShape, Planted]:  # `resized`, and the seed that it has
        after = self.resized(shape, site_id)
        return after, Planted(site_id, self.name, self.units, "" if self.units else after.part_after(shape))

    # Add the seed to the host: the part's name or "", resized parameters, and pairs of new parameter and sibling.
    @abstractmethod
    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> Grafted: ...
    # Views of the newest seed's outgoing side: zero at birth, and the seed has no effect while zero.
    @abstractmethod
    def outgoing(self, host: HostProtocol, seed: Planted) -> list[torch.Tensor]: ...
    # Remove a site's newest seed: (resized parameters, removed parameters).
    @abstractmethod
    def prune(self, host: HostProtocol, seed: Planted) -> tuple[list[Resized], list[Any]]: ...
    # Where the seed's values are, `newer` units having been added behind it: (parameter, axis, start, size).
    @abstractmethod
    def slices(self, host: HostProtocol, seed: Planted, newer: int) -> list[Slice]: ...


_KINDS: dict[str, type[Blueprint]] = {}


def register(blueprint: type[Blueprint]) -> type[Blueprint]:
    """Class decorator: make a blueprint known under its name; UserError where it is none, or another has the name."""
    what, known = f"blueprint {blueprint.__qualname__}", {"adds": GROWTH_KINDS, "site_kind": SITE_COLUMN}
    lacks = sorted(blueprint.__abstractmethods__) + ["units"] * (not hasattr(blueprint, "units"))
    if lacks or not is_dataclass(blueprint):
        raise UserError(f"{what} lacks {', '.join(lacks) or '@dataclass(frozen=True)'}: give it that.")
    for name, values in known.items():
        if getattr(blueprint, name, None) not in values:
            raise unknown(f"{name} of {what}", getattr(blueprint, name, None), values)
    if (other := _KINDS.get(blueprint.name)) is not None and other.__module__ != blueprint.__module__:
        raise UserError(f"{what} is called {blueprint.name!r}, as one of {other.__module__} is: name it otherwise.")
    _KINDS[blueprint.name] = blueprint
    return blueprint


def names_for(site_kind: SiteKind) -> tuple[str, ...]:
    """The blueprints that a kind of site accepts."""
    return tuple(name for name, blueprint in _KINDS.items() if blueprint.site_kind == site_kind)


def blueprints_of(growth: GrowthSpec) -> dict[str, Blueprint]:
    """A spec's blueprints by name, those of its plug-ins and of installed packages too; UserError for a wrong one."""
    for module in plugins.modules(growth):
        plugins.imported(module)
        own = [name for name, kind in _KINDS.items() if f"{kind.__module__}.".startswith(f"{module}.")]
        if not {*own} & growth.blueprints.keys():
            told = f"of the blueprints of plug-in {module!r} ({', '.join(own) or 'none'}) growth.blueprints names none"
            raise UserError(f"{told}: add one, with --set growth.blueprints.NAME={{}}.")
    return make_blueprints(growth.blueprints)


def make_blueprints(settings: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Blueprint]:
    """Blueprints by name, with these settings or, for None, all with defaults; UserError for an invalid setting."""
    made: dict[str, Blueprint] = {}
    for name, values in ({kind: {} for kind in _KINDS} if settings is None else settings).items():
        if name not in _KINDS:
            raise unknown("blueprint", name, _KINDS)
        known = {field.name: field for field in fields(_KINDS[name])}  # pyright: ignore[reportArgumentType]
        for key in values:
            if key not in known:
                raise unknown(f"setting of blueprint {name}", key, known)
        try:
            made[name] = TypeAdapter(_KINDS[name]).validate_python(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what, rule = f"growth.blueprints.{name}.{first['loc'][0]}", first["msg"].removeprefix("Input should be ")
            raise UserError(f"{what} is {first['input']!r}: it must be {rule}.") from None
    return made


def shape_without(
    shape: Any, seeds: Mapping[int, Planted], blueprints: Mapping[str, Blueprint], site_id: str
) -> tuple[HostShape, dict[int, Planted]]:
    """Without a site's newest seed, and the seeds by number without it and those inside it."""
    number = max(number for number, seed in seeds.items() if seed.site == site_id)
    after = blueprints[seeds[number].blueprint].pruned(shape, seeds[number])
    there = {site.id for site in after.injection_specs()} | {*after.parts()}
    left = {other: seed for other, seed in seeds.items() if other != number}
    return after, {other: seed for other, seed in left.items() if seed.site in there or seed.part in there}
