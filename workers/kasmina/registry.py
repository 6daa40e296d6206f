"""The registry of blueprints: the one list from which candidates, mask, costs and padded sizes are derived.

A blueprint (the field's growth operator) is a frozen dataclass: its fields are its settings, which
`RunSpec.growth.blueprints` chooses and sets. To add one: write a file in `blueprints/`, decorate it with `@register`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol

import torch

from esper.platform.contracts import HostProtocol, HostShape, SiteKind
from esper.platform.errors import UserError, unknown


class Blueprint(Protocol):
    """What a blueprint must tell.

    Attributes:
        name: as actions, specs and records call it.
        site_kind: the kind of site it grows at.
        adds: what it adds, one of `telemetry.GROWTH_KINDS`.
    """

    name: ClassVar[str]
    site_kind: ClassVar[SiteKind]
    adds: ClassVar[str]

    def allowed(self, shape: HostShape, site_id: str) -> bool:
        """Whether the site may take one more of these."""
        ...

    def resized(self, shape: Any, site_id: str) -> HostShape:
        """The shape after: what it adds in parameters and FLOPs is the difference of the two shapes' closed forms."""
        ...

    def graft(self, host: HostProtocol, site_id: str, generator: torch.Generator) -> list[tuple[Any, Any]]:
        """Add the seed's tensors to the host; returns each new parameter with its sibling in the host."""
        ...


_KINDS: dict[str, type[Blueprint]] = {}


def register(blueprint: type[Blueprint]) -> type[Blueprint]:
    """Class decorator: make a blueprint known under its name."""
    if blueprint.name in _KINDS:
        raise ValueError(f"two blueprints are named {blueprint.name!r}: give one another name.")
    _KINDS[blueprint.name] = blueprint
    return blueprint


def names() -> tuple[str, ...]:
    """Every registered name, in order of registration."""
    return tuple(_KINDS)


def names_for(site_kind: SiteKind) -> tuple[str, ...]:
    """The blueprints that a kind of site accepts."""
    return tuple(name for name, blueprint in _KINDS.items() if blueprint.site_kind == site_kind)


def make_blueprints(settings: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Blueprint]:
    """Name → blueprint with its settings; none means every registered one with its defaults.

    Raises:
        UserError: an unknown blueprint or setting, or a value that is not allowed.
    """
    if settings is None:
        settings = {name: {} for name in _KINDS}
    made: dict[str, Blueprint] = {}
    for name, values in settings.items():
        if name not in _KINDS:
            raise unknown("blueprint", name, _KINDS)
        known = {field.name: field for field in fields(_KINDS[name])}  # pyright: ignore[reportArgumentType]
        for key, value in values.items():
            if key not in known:
                raise unknown(f"setting of blueprint {name}", key, known)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"growth.blueprints.{name}.{key} is {value!r}: it must be a whole number of at least 1."
                )
        made[name] = _KINDS[name](**values)
    return made
