"""A sweep's grid: the points that `--grid key=a,b,c` spans, each with a spec of its own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esper.platform.errors import UserError
from esper.platform.spec import RunSpec, value_of


@dataclass(frozen=True)
class Point:
    """A grid point.

    Attributes:
        index: its number.
        values: by dotted key.
        spec: with the values put in.
    """

    index: int
    values: dict[str, Any]
    spec: RunSpec

    @property
    def grid(self) -> str:
        """As MLflow's tag has it."""
        return json.dumps(self.values, sort_keys=True)


def parse_grid(grids: Sequence[str], spec: RunSpec) -> list[Point]:
    """The points of the grid that `--grid key=a,b,c` spans, given once per key; one point without any.

    Raises:
        UserError: no `key=values`, a key twice, an unknown key, a value that is not allowed, or another text.
    """
    points: list[dict[str, Any]] = [{}]
    for grid in grids:
        key, equals, text = grid.partition("=")
        values = _grid_values(text)
        if not equals or not key or not values:
            raise UserError(f"--grid {grid!r} is not of the form key.path=a,b,c, such as budget.amount=1e6,3e6.")
        if any(key in point for point in points):
            raise UserError(f"--grid names {key} twice: give all its values at once.")
        if key.startswith("data.") and key.split(".")[1] not in ("batch_size", "eval_tokens"):
            raise UserError(f"--grid {key} would change the text: a sweep compares on one; run a sweep for each.")
        if key.split(".")[0] in ("preset", "fleet"):
            raise UserError(f"--grid {key} changes no number of a run: give it once, with --set {key}=….")
        unlike = {json.dumps(value, sort_keys=True): value for value in values}.values()
        points = [{**point, key: value} for point in points for value in unlike]
    return [Point(index, values, spec.overridden(values)) for index, values in enumerate(points)]


def _grid_values(text: str) -> list[Any]:
    """Values between commas, those of JSON lists and objects left whole."""
    try:
        return list(json.loads(f"[{text}]"))
    except ValueError:
        return [value_of(part.strip()) for part in text.split(",") if part.strip()]
