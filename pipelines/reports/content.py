"""What a report says, before it is a page or Markdown: a section per grid point, its tables, and its provenance."""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from esper import __version__
from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.store import Sweep
from esper.pipelines.reports.tables import AXES, Tables
from esper.pipelines.reports.verdict import ArmRow, Verdict

AXIS_NAMES = {
    "parameter_seconds": "parameter-seconds",
    "flops": "FLOPs",
    "seconds": "seconds",
    "tokens": "tokens",
    "steps": "steps",
}
QUESTIONS = {
    "Mechanics": "Is growing itself harmless?",
    "Efficiency": "At equal budget, does an arm that grows end lower than a static network of its final size, than the "
    "best static size, and than the best fixed schedule?",
    "Transfer": "Does what was learnt hold for another kind of network?",
}
GARDENED = ("ppo", "openloop")  # arms that a controller's training has to be paid for
EQUAL = 1.02  # costs are equal up to the overshoot of the last optimizer step
UNKNOWN = "not recorded"
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A table's cell: an outcome (a coloured label), a text and a note below it, as far as there are any."""

    text: str = ""
    outcome: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Heads and rows; columns from `numbers` on are numbers."""

    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    numbers: int = 1


@dataclass(frozen=True)
class Section:
    """One grid point.

    Attributes:
        point: its entry in `sweep.json`.
        verdict: what the sweep says there.
        tables: its trials only.
    """

    point: dict[str, Any]
    verdict: Verdict
    tables: Tables

    @property
    def title(self) -> str:
        """The grid point in words."""
        grid = json.loads(self.verdict.grid)
        return ", ".join(f"{key} = {value}" for key, value in grid.items()) or "The sweep's one setting"

    @property
    def budget(self) -> str:
        """The budget in words."""
        return f"{count(self.verdict.amount)} {AXIS_NAMES.get(self.verdict.axis, self.verdict.axis)}"

    @property
    def labels(self) -> list[str]:
        """Labels, statics first."""
        return [row.label for row in self.verdict.rows]

    def test(self, name: str) -> Any:
        """The test runs' rows of a table: a DataFrame (pandas has no types of its own that a checker could follow)."""
        table = getattr(self.tables, name)
        return table[table["purpose"] == "test"]

    def grown(self) -> list[str]:
        """Labels of which a test run has changed its network, in the table's order."""
        changed = set(self.test("timeline")["label"])
        return [label for label in self.labels if label in changed]


@dataclass(frozen=True)
class Report:
    """Everything that is shown.

    Attributes:
        sweep: the parent run.
        experiment: name.
        store: address, without a password.
        sections: a section per grid point.
        notes: what was left out, in sentences.
        finals: a row per trial of the sweep.
    """

    sweep: Sweep
    experiment: str
    store: str
    sections: list[Section]
    notes: list[str]
    finals: pd.DataFrame = field(repr=False)

    @property
    def record(self) -> dict[str, Any]:
        """`sweep.json`."""
        assert self.sweep.record is not None
        return self.sweep.record

    @property
    def labels(self) -> list[str]:
        """All labels of all sections, statics first."""
        return list(dict.fromkeys(label for section in self.sections for label in section.labels))

    def as_dict(self) -> dict[str, Any]:
        """`report.json`."""
        return plain(
            {
                "experiment": self.experiment,
                "sweep": self.sweep.name,
                "verdicts": [section.verdict.as_dict() for section in self.sections],
                "payback": {section.verdict.grid: payback(self, section) for section in self.sections},
                "notes": self.notes,
                "provenance": provenance(self),
                "finals": self.finals.to_dict("records"),
            }
        )


# -- Tables ------------------------------------------------------------------------------------------------------------


def arm_table(section: Section) -> Table:
    """A row per label: what it reached, against the envelope, its size and its cost."""
    axes = [AXIS_NAMES[axis] for axis in AXES]
    head = ("arm", "seeds", "final loss", "Δ to the envelope", "layers", "parameters", "grafts", *axes)
    rows = []
    for row in section.verdict.rows:
        rows.append(
            (
                Cell(row.label),
                Cell(str(row.seeds), note=f"{row.diverged} diverged" if row.diverged else ""),
                Cell(_mean(row.loss)),
                Cell(NONE if row.difference is None else str(row.difference), row.outcome),
                Cell(_number(row.layers, ".3g")),
                Cell(_number(row.parameters, ",.0f")),
                Cell(_number(row.grafts, ".3g")),
                *(Cell(short(row.cost.get(axis))) for axis in AXES),
            )
        )
    return Table(head, rows)


def claims_table(section: Section) -> Table:
    """A row per arm and opponent, a column per axis; who stands for the opponent may differ by axis."""
    cells: dict[str, dict[str, dict[str, Cell]]] = {}
    for claim in section.verdict.claims:
        text, pairs = (str(claim.interval), f", n = {claim.seeds}") if claim.interval else ("", "")
        cell = Cell(text, claim.outcome, f"{claim.against}{pairs}" if claim.against else claim.reason)
        cells.setdefault(claim.arm, {}).setdefault(claim.opponent, {})[claim.axis] = cell
    rows = [
        (Cell(arm), Cell(opponent), *(by_axis.get(axis, Cell(NONE)) for axis in AXES))
        for arm, opponents in cells.items()
        for opponent, by_axis in opponents.items()
    ]
    return Table(("arm", "against", *(f"equal {AXIS_NAMES[axis]}" for axis in AXES)), rows, 2)


def reasons_table(section: Section) -> Table:
    """Why claims are not plain ones; those with one reason on several axes together."""
    axes: dict[tuple[str, str, str, str], list[str]] = {}
    for claim in section.verdict.claims:
        if claim.reason:
            key = claim.arm, claim.opponent, claim.outcome, claim.reason
            axes.setdefault(key, []).append(AXIS_NAMES[claim.axis])
    rows = [
        (Cell(arm), Cell(opponent), Cell(", ".join(names)), Cell("", outcome), Cell(reason))
        for (arm, opponent, outcome, reason), names in axes.items()
    ]
    return Table(("arm", "against", "at equal", "outcome", "why"), rows, 5)


def timeline_table(section: Section, label: str) -> Table:
    """Each change of a label's networks on the test seeds: when, where, what, and what became of it."""
    changes = section.test("timeline")
    rows = [
        (
            Cell(str(row["seed"])),
            Cell(f"{row['budget_fraction']:.1%}"),
            Cell(row["event"]),
            Cell(row["blueprint"] or NONE),
            Cell(row["site"] or NONE),
            Cell(_outcome(row)),
            Cell(_step(row, "parameters", ",.0f")),
            Cell(_step(row, "val_loss", ".4f")),
        )
        for row in _records(changes[changes["label"] == label].sort_values(["seed", "budget_fraction"]))
    ]
    head = ("seed", "budget", "event", "blueprint", "site", "outcome", "parameters", "validation loss at the change")
    return Table(head, rows, 6)


def finals_table(section: Section) -> Table:
    """The final loss of every label on every test seed."""
    finals = section.test("finals")
    seeds = sorted(set(finals["seed"]))
    rows = []
    for label in section.labels:
        own = {row["seed"]: row for row in _records(finals[finals["label"] == label])}
        rows.append((Cell(label), *(_final(own.get(seed)) for seed in seeds)))
    return Table(("arm", *(f"seed {seed}" for seed in seeds)), rows)


def troubles_table(report: Report) -> Table:
    """Trials that failed, never ran or diverged."""
    rows = [
        (Cell(name), Cell("", trial["status"]), Cell(trial.get("error") or NONE))
        for name, trial in report.record.get("trials", {}).items()
        if trial.get("status") in ("failed", "missing")
    ]
    diverged: Any = report.finals[report.finals["diverged"]]
    rows += [(Cell(name), Cell("", "diverged"), Cell("the governor gave the run up")) for name in diverged["name"]]
    return Table(("trial", "what happened", "said"), rows, 3)


# -- Sentences ---------------------------------------------------------------------------------------------------------


def payback(report: Report, section: Section) -> list[str]:
    """What training the policy cost, and after how many uses it has paid; nothing where none was trained."""
    controller = section.point.get("controller", report.record.get("controller"))
    rows = [row for row in section.verdict.rows if row.arm in GARDENED]
    if not controller or not rows:
        return []
    cost, seconds = controller.get("parameter_seconds"), controller.get("wall_seconds")
    on = {"laws": "on loss laws", "text": "on text"}.get(controller.get("trained_on", ""))
    if on is None or cost is None:
        return [
            "The policy was given ready-made, or what its training cost was not recorded: after how many uses it has "
            "paid cannot be said."
        ]
    wall = "" if seconds is None else f" in {count(seconds)} s"
    told = f"The policy was trained {on} for {count(cost)} parameter-seconds{wall}, which no arm's budget contains."
    return [told, *(_paid(row, cost, section) for row in rows)]


def _paid(row: ArmRow, cost: float, section: Section) -> str:
    """After how many uses one label has paid: by the parameter-seconds that the envelope needs for the same loss."""
    points = sorted(section.verdict.envelope.get("parameter_seconds", ()), key=lambda point: point.cost)
    used = row.cost.get("parameter_seconds")
    if row.loss is None or used is None or not points:
        return f"{row.label}: there is no final loss, or no envelope, to tell its saving by."
    loss, longest = row.loss.mean, points[-1].cost
    ended = f"{row.label} ends at {loss:.4f} after {count(used)} parameter-seconds"
    if min(point.loss for point in points) > loss:
        if longest <= used * EQUAL:
            return (
                f"{ended}, below every static run; none was trained longer, so what a static run would need for that "
                "loss, and hence the saving, cannot be said."
            )
        saved = longest - used
        return (
            f"{ended}, below every static run up to {count(longest)}: a use saves more than {count(saved)}, and the "
            f"training has paid after at most {math.ceil(cost / saved):,} uses."
        )
    needed = _cost_of(loss, [point.cost for point in points], [point.loss for point in points])
    if needed is None:
        return f"{ended}, which the envelope reaches with less than its shortest run: no use saves anything."
    if needed <= used:
        return f"{ended}; the envelope needs {count(needed)} for that loss: a use saves nothing, so it never pays."
    return (
        f"{ended}; the envelope needs {count(needed)} for that loss: a use saves {count(needed - used)}, and the "
        f"training has paid after {math.ceil(cost / (needed - used)):,} uses."
    )


def _cost_of(loss: float, costs: Sequence[float], losses: Sequence[float]) -> float | None:
    """The least cost at which a falling curve reaches a loss, linear in log cost; None where it starts below it."""
    if losses[0] <= loss:
        return None
    for i in range(1, len(costs)):
        if losses[i] <= loss:
            share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
            return float(np.exp(np.log(costs[i - 1]) + share * np.log(costs[i] / costs[i - 1])))
    return None


def provenance(report: Report) -> dict[str, str]:
    """Where the numbers are from; what the sweep did not log is said to be not recorded."""
    tags, record = report.sweep.tags, report.record
    spec = record["points"][0].get("spec") or {}
    data, clock = spec.get("data") or {}, spec.get("clock") or {}
    started = datetime.fromtimestamp(report.sweep.started / 1000, UTC)
    seeds, tuning = record.get("seeds") or [], record.get("tuning_seeds") or []
    source = ", ".join(str(data[key]) for key in ("source", "tokenizer") if data.get(key))
    measured = f"{clock['kind']} clock, measured on {clock.get('measured_on', UNKNOWN)}" if "kind" in clock else UNKNOWN
    return {
        "sweep": f"{report.sweep.name}, {report.sweep.status.lower()}",
        "started": f"{started:%Y-%m-%d %H:%M} UTC",
        "preset": tags.get("preset", UNKNOWN),
        "commit": tags.get("commit", UNKNOWN),
        "command": shlex.join(map(str, record.get("command") or ())) or UNKNOWN,
        "data": tags.get("data") or source or UNKNOWN,
        "hardware": tags.get("hardware", UNKNOWN),
        "clock": measured,
        "test seeds": ", ".join(map(str, seeds)) or "none",
        "tuning seeds": ", ".join(map(str, tuning)) or "none",
        "learning rates": _rates(record),
        "MLflow": f"{report.store}, experiment {report.experiment}, parent run {report.sweep.run_id}",
        "sweep's versions": tags.get("versions", UNKNOWN),
        "report's versions": ", ".join(
            [
                f"esper {__version__}",
                *(f"{name} {version(name)}" for name in ("mlflow", "scipy", "numpy", "matplotlib")),
            ]
        ),
        "report drawn": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _rates(record: dict[str, Any]) -> str:
    """The learning rates by size at each grid point."""
    if not record.get("rates_tuned"):
        return "not tuned"
    told = []
    for point in record["points"]:
        rates = point.get("rates") or {}
        at = f" (grid {point['grid']})" if len(record["points"]) > 1 else ""
        told.append(", ".join(f"{size} layer(s) {rate:g}" for size, rate in rates.items()) + at)
    return "tuned: " + "; ".join(told)


def settings(report: Report) -> str:
    """What was swept, in one line."""
    record = report.record
    trials = len(record.get("trials", {})) or len(report.finals)
    many = len(report.sections)
    points = f", at {many} grid points" if many > 1 else f", at an equal budget of {report.sections[0].budget}"
    return f"{len(report.labels)} arms, {len(record.get('seeds') or [])} test seeds, {trials} trials{points}"


# -- Numbers -----------------------------------------------------------------------------------------------------------


def short(value: float | None) -> str:
    """A large number with three digits: 1.02M."""
    if value is None or not math.isfinite(value):
        return NONE
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if letter != 'k' else 1e3):.3g}{letter}"
    return count(value)


def count(value: float) -> str:
    """A number to four digits, written out: 1,020,000."""
    return f"{float(f'{value:.4g}'):,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plain(value: Any) -> Any:
    """As JSON values: what is missing, or not finite, is null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def _mean(interval: Interval | None) -> str:
    if interval is None:
        return NONE
    return f"{interval.mean:.4f}" + ("" if interval.half is None else f" ± {interval.half:.4f}")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _step(row: dict[str, Any], name: str, form: str) -> str:
    """`before → after`; what was not noted is left out."""
    before, after = (row.get(f"{name}_{when}") for when in ("before", "after"))
    return NONE if before is None or after is None else f"{before:{form}} → {after:{form}}"


def _outcome(row: dict[str, Any]) -> str:
    """What became of a graft; other events have no outcome."""
    if row["event"] != "graft":
        return NONE
    return row["outcome"] or "on probation at the end"


def _final(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(NONE)
    if row["diverged"]:
        return Cell("", "diverged")
    return Cell("", row["status"].lower()) if row["val_loss"] is None else Cell(f"{row['val_loss']:.4f}")


def _records(frame: Any) -> Iterable[dict[str, Any]]:
    return plain(frame.to_dict("records"))
