"""The verdict of a sweep: which arm ends lower at equal cost, how sure that is, and what the data cannot say."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.claims import CANNOT_SAY, Claim, interval_dict, pair
from esper.pipelines.reports.criteria import Criterion, efficiency, find_caveats, mechanics
from esper.pipelines.reports.envelope import EnvelopePoint, draw_envelope, read_runs, sound
from esper.pipelines.reports.opponents import ENVELOPE, OPPONENTS, Bench
from esper.pipelines.reports.tables import AXES, Tables

TRANSFER = "Whether it transfers cannot be said: no arm here was trained on growing a CNN."


@dataclass(frozen=True)
class ArmRow:
    """A label's test runs; means are over those that finished and did not diverge, None where there is none.

    Attributes:
        label: as tables call it.
        arm: the arm.
        size: layers at the start; None where the arm has none.
        seeds: runs that finished and did not diverge.
        diverged: runs that the governor gave up.
        loss: mean final loss with its 95 % interval, nats per token.
        losses: final loss by seed.
        difference: final loss minus the envelope's at equal budget, paired by seed; None for the envelope's own size.
        outcome: of that difference, as in the claim; None for arms that do not grow.
        parameters, layers, grafts: means at the end.
        cost: mean of each axis of AXES.
        wall_seconds: mean.
    """

    label: str
    arm: str
    size: int | None
    seeds: int
    diverged: int
    loss: Interval | None
    losses: dict[int, float]
    difference: Interval | None
    outcome: str | None
    parameters: float | None
    layers: float | None
    grafts: float | None
    cost: dict[str, float]
    wall_seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "loss": interval_dict(self.loss), "difference": interval_dict(self.difference)}


@dataclass(frozen=True)
class Verdict:
    """What a sweep says at one grid point.

    Attributes:
        grid: the grid point, JSON text.
        axis: the budget's axis, as it was given: one of AXES, or steps.
        amount: the budget, in that axis's unit.
        size: layers of the static size that stands for the envelope at equal budget; None without static runs.
        schedule: label of the best fixed schedule; None without one.
        criteria: Mechanics, Efficiency, Transfer.
        rows: a row per label, statics first.
        claims: each grown arm, and each random control, against each opponent on each axis.
        caveats: what the data cannot say; each withholds the efficiency verdict.
        envelope: the static envelope on each axis, from low to high cost.
    """

    grid: str
    axis: str
    amount: float
    size: int | None
    schedule: str | None
    criteria: tuple[Criterion, ...]
    rows: tuple[ArmRow, ...]
    claims: tuple[Claim, ...]
    caveats: tuple[str, ...]
    envelope: dict[str, tuple[EnvelopePoint, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **vars(self),
            "criteria": [vars(criterion) for criterion in self.criteria],
            "rows": [row.as_dict() for row in self.rows],
            "claims": [claim.as_dict() for claim in self.claims],
            "envelope": {axis: [vars(point) for point in points] for axis, points in self.envelope.items()},
        }


def judge(tables: Tables, point: dict[str, Any], *, sweep: dict[str, Any]) -> Verdict:
    """Judge one grid point. Test runs are compared; tuning runs only choose what they are compared with.

    Args:
        tables: every trial of the sweep.
        point: an entry of `sweep["points"]`.
        sweep: what `sweep.json` holds.
    """
    bench = Bench(read_runs(tables, point["grid"]), point)
    claims = [claim for axis in AXES for opponent in OPPONENTS for claim in bench.claims(opponent, axis)]
    caveats = find_caveats(bench, point, sweep)
    timeline = [event for event in tables.timeline.to_dict("records") if event["grid"] == point["grid"]]
    criteria = (
        mechanics(bench, timeline),
        efficiency(bench, claims, caveats),
        Criterion("Transfer", TRANSFER, CANNOT_SAY),
    )
    return Verdict(
        grid=point["grid"],
        axis=point["budget"]["axis"],
        amount=bench.amount,
        size=bench.size,
        schedule=bench.schedule,
        criteria=criteria,
        rows=tuple(_row(bench, label, claims) for label in _order(bench, sweep["arms"])),
        claims=tuple(claims),
        caveats=tuple(caveats),
        envelope={axis: draw_envelope(bench.statics, axis) for axis in AXES},
    )


def _order(bench: Bench, arms: list[str]) -> list[str]:
    """Labels with test runs: static sizes from small to large, then as the sweep names them, then the rest."""
    statics = [label for label in map(bench.static, bench.statics) if label]
    return list(dict.fromkeys([*statics, *(label for label in arms if label in bench.test), *bench.test]))


def _row(bench: Bench, label: str, claims: list[Claim]) -> ArmRow:
    runs = bench.test[label]
    first, kept = next(iter(runs.values())), sound(runs)

    def mean(column: str) -> float | None:
        value = float(np.mean([run.final[column] for run in kept.values()])) if kept else math.nan
        return value if math.isfinite(value) else None

    claim = next((c for c in claims if (c.arm, c.opponent, c.axis) == (label, ENVELOPE, bench.axis)), None)
    difference = claim.interval if claim else None
    envelope = bench.static(bench.size)
    if claim is None and envelope not in (None, label):
        pairs = pair(runs, bench.test[envelope], bench.axis, own=True)
        difference = Interval.of(pairs.differences) if len(pairs.differences) > 1 and not pairs.beyond else None
    return ArmRow(
        label=label,
        arm=first.arm,
        size=first.size,
        seeds=len(kept),
        diverged=sum(run.diverged for run in runs.values()),
        loss=Interval.of(np.array([run.loss for run in kept.values()])) if kept else None,
        losses={seed: run.loss for seed, run in kept.items()},
        difference=difference,
        outcome=claim.outcome if claim else None,
        parameters=mean("parameters"),
        layers=mean("layers"),
        grafts=mean("grafts"),
        cost={axis: value for axis in AXES if (value := mean(axis)) is not None},
        wall_seconds=mean("wall_seconds"),
    )
