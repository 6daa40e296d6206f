"""The static envelope: the lowest annealed loss that any static size reaches at a cost.

A loss between two annealed points of a run is interpolated linearly in log cost. Between points it is a little too high
where the true curve is convex in log cost: for a + b·cost^-c by at most b·cost^-c·(c·h)²/8, h the points' distance in
log cost. Outside a run's points nothing is invented.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from esper.pipelines.reports.tables import AXES, Tables

NEAR = 0.02  # costs that differ by less than this are one: a run ends at the first step past its budget
FINISHED = "FINISHED"
WORDS = ("run_id", "name", "label", "arm", "purpose", "seed", "status", "diverged")
FINAL = (*AXES, "wall_seconds", "parameters", "layers", "grafts")
DRAWN = 50  # points of a drawn envelope


@dataclass(frozen=True)
class TrialRun:
    """One trial's end and its annealed points.

    Attributes:
        name, label, arm, size, seed, purpose: as in `Tables.finals`; `size` is None where it is NA there.
        sound: whether it ran to its end and did not diverge; only such runs are compared.
        diverged: whether the governor gave it up.
        loss: at its end, nats per token; says nothing if it is not sound.
        final: the columns FINAL of `Tables.finals`.
        points: by axis: costs (points,), increasing, and losses (points,), all annealed.
    """

    name: str
    label: str
    arm: str
    size: int | None
    seed: int
    purpose: str
    sound: bool
    diverged: bool
    loss: float
    final: dict[str, float]
    points: dict[str, tuple[np.ndarray, np.ndarray]]

    def loss_at(self, axis: str, cost: np.ndarray | float) -> np.ndarray:
        """Annealed loss at costs of any shape; NaN outside its points."""
        costs, losses = self.points[axis]
        if not len(costs):
            return np.full(np.shape(cost), np.nan)
        return np.interp(np.log(cost), np.log(costs), losses, left=np.nan, right=np.nan)

    def loss_by(self, axis: str, cost: float) -> float:
        """The loss that it has reached by a cost: its last one where it was never trained that long, NaN before any."""
        costs, losses = self.points[axis]
        return float(losses[-1]) if len(costs) and cost >= costs[-1] else float(self.loss_at(axis, cost))


Seeds = Mapping[int, TrialRun]  # a label's runs by seed


def sound(runs: Seeds) -> dict[int, TrialRun]:
    """Those that ran to their end and did not diverge."""
    return {seed: run for seed, run in runs.items() if run.sound}


@dataclass(frozen=True)
class EnvelopePoint:
    """The envelope at one cost. Where some size has no loss, the true envelope may lie lower.

    Attributes:
        cost: in the axis's unit.
        loss: the lowest mean over test seeds that is reached by that cost, nats per token.
        size: the layers of the static size that reaches it.
        untrained: sizes that were never trained that long.
        unmeasured: sizes whose first annealed loss is at a higher cost.
    """

    cost: float
    loss: float
    size: int
    untrained: tuple[int, ...] = ()
    unmeasured: tuple[int, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every size has a loss here."""
        return not (self.untrained or self.unmeasured)


def read_runs(tables: Tables, grid: str) -> list[TrialRun]:
    """The trials of one grid point, in the tables' order; un-annealed points are left behind here."""
    finals = tables.finals.loc[tables.finals["grid"].to_numpy() == grid, :]
    words = {name: finals[name].tolist() for name in WORDS}
    numbers = {name: _numbers(finals, name).tolist() for name in FINAL}
    points = {axis: _annealed(tables.curves, axis, words["run_id"]) for axis in AXES}
    runs = []
    for i, (size, loss) in enumerate(zip(_numbers(finals, "size"), _numbers(finals, "val_loss").tolist(), strict=True)):
        word = {name: column[i] for name, column in words.items()}
        diverged = word["diverged"] is True
        runs.append(
            TrialRun(
                **{name: word[name] for name in ("name", "label", "arm", "purpose")},
                size=int(size) if math.isfinite(size) else None,
                seed=int(word["seed"]),
                sound=word["status"] == FINISHED and not diverged and math.isfinite(loss),
                diverged=diverged,
                loss=loss,
                final={name: column[i] for name, column in numbers.items()},
                points={axis: points[axis][i] for axis in AXES},
            )
        )
    return runs


def _annealed(curves: pd.DataFrame, axis: str, run_ids: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per run, the costs and losses of its annealed points in increasing cost."""
    losses, costs = _numbers(curves, "val_loss"), _numbers(curves, axis)
    kept = (curves["kind"].to_numpy() == "annealed") & np.isfinite(losses) & (costs > 0)
    rows = {run_id: row for row, run_id in enumerate(run_ids)}
    run = np.array([rows.get(run_id, -1) for run_id in curves["run_id"].to_numpy()[kept]], int)
    order = np.lexsort((costs[kept], run))
    starts = np.searchsorted(run[order], np.arange(len(run_ids) + 1))
    costs, losses = costs[kept][order], losses[kept][order]
    return [(costs[i:j], losses[i:j]) for i, j in pairwise(starts)]


def _numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64 (rows,), NaN where it is empty."""
    return table[column].to_numpy(float, na_value=np.nan)


def mean_at(runs: Seeds, axis: str, cost: float) -> float:
    """Mean annealed loss of sound runs at a cost; NaN unless each of them has points on both sides of it."""
    return float(np.mean([run.loss_at(axis, cost) for run in runs.values()])) if runs else math.nan


def best_size(statics: Mapping[int, Seeds], axis: str, cost: float) -> tuple[int | None, str]:
    """The size with the lowest mean annealed loss at a cost.

    Args:
        statics: size → sound runs, of the seeds that the size is chosen on.
        axis: of AXES.
        cost: in the axis's unit.

    Returns:
        The size, and why a better one may be missing, empty if none is. Where every size's runs end below the cost, it
        is the one with the lowest last loss; None where nothing is known.
    """
    means = {size: mean_at(runs, axis, cost) for size, runs in sorted(statics.items())}
    known = {size: mean for size, mean in means.items() if math.isfinite(mean)}
    if not known:
        ends = {size: np.mean([run.loss_by(axis, cost) for run in runs.values()]) for size, runs in statics.items()}
        ends = {size: loss for size, loss in ends.items() if math.isfinite(loss)}
        return (min(ends, key=ends.__getitem__) if ends else None), ""
    best = min(known, key=known.__getitem__)
    if min(known) < best < max(known):
        return best, ""
    sizes = ", ".join(map(str, known))
    return best, f"of the static sizes with losses at this cost ({sizes}) the best is an outermost one ({best})"


def draw_envelope(statics: Mapping[int, Seeds], axis: str) -> tuple[EnvelopePoint, ...]:
    """The envelope over the whole range of some static runs.

    Args:
        statics: size → its sound test runs.
        axis: of AXES.

    Returns:
        Points at increasing cost, from the first annealed loss of any size to the last; the loss never rises.
    """
    curves = {size: [run.points[axis] for run in runs.values()] for size, runs in statics.items()}
    curves = {size: runs for size, runs in sorted(curves.items()) if runs and all(len(costs) for costs, _ in runs)}
    if not curves:
        return ()
    first, last = (
        {size: float(np.mean([costs[end] for costs, _ in runs])) for size, runs in curves.items()} for end in (0, -1)
    )
    grid = np.unique(np.geomspace(min(first.values()), max(last.values()), DRAWN))
    losses = np.array([np.mean([_held(grid, *run) for run in runs], axis=0) for runs in curves.values()])
    losses[np.isnan(losses)] = np.inf
    points: list[EnvelopePoint] = []
    lowest, size = math.inf, 0
    for cost, column in zip(grid.tolist(), losses.T, strict=True):
        if column.min() < lowest:
            lowest, size = float(column.min()), list(curves)[int(column.argmin())]
        if math.isfinite(lowest):
            untrained = tuple(n for n in curves if last[n] * (1 + NEAR) < cost)
            unmeasured = tuple(n for n in curves if cost < first[n] / (1 + NEAR))
            points.append(EnvelopePoint(cost, lowest, size, untrained, unmeasured))
    return tuple(points)


def _held(grid: np.ndarray, costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """A run's losses on a grid (costs,), held for a little beyond its ends: seeds do not end at quite the same cost."""
    held = np.interp(np.log(grid), np.log(costs), losses)
    held[(grid < costs[0] / (1 + NEAR)) | (grid > costs[-1] * (1 + NEAR))] = np.nan
    return held
