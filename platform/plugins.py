"""Plug-ins: modules of the user's own, named in a command or a spec, or announced by an installed package.

Entry points: group `esper.arms`, name = `module:object`; group `esper.blueprints`, a blueprint's name = `module`.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from esper.platform.errors import in_a_sentence
from esper.platform.spec import GrowthSpec

ARMS, BLUEPRINTS = "esper.arms", "esper.blueprints"


def imported(name: str) -> ModuleType:
    """A plug-in's module; UserError where it does not import. The working directory is looked in last."""
    with in_a_sentence(f"plug-in {name!r} does not import", "mend it, or run where it lies, or set PYTHONPATH"):
        here = str(Path.cwd())
        if here not in sys.path:  # as for `python -m`; Ray's workers have the driver's
            sys.path.append(here)
        return importlib.import_module(name)


@cache
def announced(group: str) -> dict[str, str]:
    """Name → `module` or `module:object`, of the entry points that installed packages have in a group."""
    return {point.name: point.value for point in entry_points(group=group)}


def arm_target(name: str) -> str | None:
    """The `module:object` that an arm's name means; None where it means none."""
    module, _, attribute = name.partition(":")
    return name if module and attribute else announced(ARMS).get(name)


def modules(growth: GrowthSpec, arms: Iterable[str] = ()) -> list[str]:
    """Names of the modules that a run by these arms takes from plug-ins."""
    targets = [*(arm_target(arm) for arm in arms), *(announced(BLUEPRINTS).get(name) for name in growth.blueprints)]
    return sorted({*growth.plugins, *(target.partition(":")[0] for target in targets if target)})


def digest(name: str) -> str:
    """SHA-256 of a plug-in's source file, or of all in its package; of nothing where it has none."""
    imported(name)
    top = sys.modules[name.partition(".")[0]]
    file = getattr(top, "__file__", None)
    files = [Path(file)] if file else []
    for folder in getattr(top, "__path__", ()):
        files += sorted(Path(folder).rglob("*.py"))
    with in_a_sentence(f"plug-in {name!r} cannot be read", "put its files back"):
        return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
