"""Arms that played the same instances, side by side: means, paired differences with intervals, and the gap closed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.pipelines.common.statistics import Interval

if TYPE_CHECKING:
    from esper.pipelines.controllers.evaluation import Played  # imports torch

BOUND = "bound"  # the row of the clairvoyant bound


@dataclass(frozen=True)
class Row:
    """An arm in the table; None where there is nothing to hold it against.

    Attributes:
        arm: its name.
        loss: mean final loss, nats per token.
        to_bound: its mean distance to the clairvoyant bound.
        difference: to the reference arm, in pairs.
        closed: share of the gap between the reference arm and the bound that it closes.
        grafts: mean grafts of an episode; None for the bound.
        diverged: episodes that had to be given up.
    """

    arm: str
    loss: float
    to_bound: float | None
    difference: Interval | None
    closed: float | None
    grafts: float | None = None
    diverged: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "difference": self.difference and self.difference.as_dict()}


@dataclass(frozen=True)
class Comparison:
    """Arms side by side.

    Attributes:
        played: what each arm reached, on the same instances.
        reference: name of the arm that the others are held against.
        bounds: lowest reachable loss of each instance, float64 (instances,); None where nobody knows it.
    """

    played: "Sequence[Played]"
    reference: str | None = None
    bounds: np.ndarray | None = None

    def rows(self) -> list[Row]:
        """A row per arm, then the bound."""
        reference = next((p.losses() for p in self.played if p.arm == self.reference), None)
        rows = [
            replace(self._row(p.arm, p.losses(), reference), grafts=float(np.mean(p.grafts())), diverged=p.diverged())
            for p in self.played
        ]
        return rows if self.bounds is None else [*rows, self._row(BOUND, self.bounds, reference)]

    def _row(self, arm: str, losses: np.ndarray, reference: np.ndarray | None) -> Row:
        difference = None if reference is None or arm == self.reference else Interval.of(losses - reference)
        to_bound = None if self.bounds is None or arm == BOUND else float((losses - self.bounds).mean())
        closed = None
        if reference is not None and self.bounds is not None:
            gap = float((reference - self.bounds).mean())
            closed = float((reference - losses).mean()) / gap if gap > 0 else None
        return Row(arm, float(losses.mean()), to_bound, difference, closed)

    def table(self) -> str:
        """The rows as text; a column without any number is left out."""
        columns: dict[str, Callable[[Row], str]] = {
            "arm": lambda row: row.arm,
            "mean final loss": lambda row: f"{row.loss:.4f}",
            "to the bound": lambda row: _cell(row.to_bound, "{:.4f}"),
            f"against {self.reference}": lambda row: _cell(row.difference, "{}"),
            "gap closed": lambda row: _cell(row.closed, "{:.0%}"),
            "grafts": lambda row: _cell(row.grafts, "{:.1f}"),
            "diverged": lambda row: _cell(row.diverged or None, "{}"),
        }
        rows = self.rows()
        lines = [[name, *(cell(row) for row in rows)] for name, cell in columns.items()]
        return _aligned([column for column in lines if any(column[1:])])

    def instances(self) -> dict[int, dict[str, Any]]:
        """Per instance: the bound, and what each arm reached; as JSON values."""
        return {
            id: {
                BOUND: None if self.bounds is None else float(self.bounds[i]),
                "arms": {p.arm: _reached(p.summaries[id]) for p in self.played},
            }
            for i, id in enumerate(self.played[0].summaries)
        }


def _reached(summary: dict[str, Any]) -> dict[str, Any]:
    grafts = [
        {"at": graft["budget_fraction"], "blueprint": graft["blueprint"], "site": graft["site"]}
        for graft in summary["grafts"]
    ]
    kept = ("val_loss", "diverged", "parameters", "decisions", "parameter_seconds", "tokens")
    return {**{key: summary[key] for key in kept}, "grafts": grafts, "prunes": len(summary["prunes"])}


def _cell(value: object | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _aligned(columns: list[list[str]]) -> str:
    """Columns, each with its name on top, as lines: the first to the left, numbers to the right."""
    padded = []
    for i, column in enumerate(columns):
        width = max(map(len, column))
        head, *cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for cell in column]
        padded.append([head, "-" * width, *cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))
