"""Arms over several budgets: their regret to the tuned static envelope, and the part of the budget that they save.

Regret: a final loss minus that of the static size chosen for the same budget B on tuning seeds, on the same test seed.
Budget saved: 1 − B/B', where the envelope (these sizes' mean losses) reaches the arm's loss at B'. Intervals are 95 %
over seeds, of a seed's regret or its log B'/B, or their means over the budgets; the envelope counts as known.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from esper.pipelines.common.statistics import Interval, detectable
from esper.pipelines.reports.paired_tests import Trials
from esper.pipelines.reports.verdict import Verdict
from esper.pipelines.sweeps.plan import AMOUNT


@dataclass(frozen=True)
class Regret:
    """What an arm has lost or saved at a budget, or in the mean over budgets."""

    arm: str
    budget: float | None  # None: the mean
    values: np.ndarray  # nats (pairs,)
    gains: np.ndarray  # log B'/B (pairs,)
    sequential: bool  # seeds were added while one looked

    @property
    def interval(self) -> Interval | None:
        return Interval.of(self.values, self.sequential) if len(self.values) else None

    @property
    def detectable(self) -> float | None:
        """The smallest regret that so many seeds with this spread would show."""
        return detectable(self.values, self.sequential)

    @property
    def saved(self) -> list[float]:
        """The part of the budget saved, and the ends of its interval if it has one; empty where it is not known."""
        if not len(self.gains) or not np.isfinite(self.gains).all():
            return []
        found = Interval.of(self.gains, self.sequential)
        ends = [] if found.half is None else [found.mean - found.half, found.mean + found.half]
        return (-np.expm1(-np.array([found.mean, *ends]))).tolist()

    def as_dict(self) -> dict[str, Any]:
        told = {"arm": self.arm, "budget": self.budget, "pairs": len(self.values), "saved": self.saved}
        return told | {"regret": self.interval and self.interval.as_dict(), "detectable": self.detectable}

    def cells(self) -> tuple[str, str, str]:
        """For a table: the regret, what would have shown, and the part saved, as `+15% (+3% to +25%)`."""
        if not self.values.any():
            return ("0", "–", "0") if len(self.values) else ("–", "–", "–")  # the size itself, or an arm that is one
        least, (mean, *ends) = self.detectable, [f"{part:+.0%}" for part in self.saved] or ["–"]
        return str(self.interval), f"{least:.4f}" if least else "–", mean + f" ({' to '.join(ends)})" * bool(ends)


@dataclass(frozen=True)
class OverBudgets:
    """The grid points that differ in their budget only, from the smallest on; one, or several."""

    points: Sequence[Trials]
    title: str  # the rest of the grid

    @property
    def sequential(self) -> bool:
        return self.points[0].sequential

    @cached_property
    def budgets(self) -> np.ndarray:
        return np.array([trials.amount for trials in self.points])

    @cached_property
    def envelope(self) -> np.ndarray:
        """Mean final losses of the sizes chosen (budgets,); NaN where there is none."""
        runs = [list(trials.sound(trials.best_static).values()) for trials in self.points]
        return np.array([np.mean([run.loss for run in own]) if own else np.nan for own in runs])

    @cached_property
    def regrets(self) -> dict[str, np.ndarray]:
        """Nats (seeds, budgets) by label, the seeds in order; NaN where one of a pair has no loss."""
        labels = [label for label in self.points[0].labels if any(label in trials.test for trials in self.points)]
        seeds = sorted({run.seed for trials in self.points for run in trials.test_runs()})
        found = {}
        for label in labels:
            pairs = [(trials.sound(label), trials.sound(trials.best_static)) for trials in self.points]
            rows = [[a[s].loss - b[s].loss if s in a and s in b else np.nan for a, b in pairs] for s in seeds]
            found[label] = np.array(rows)
        return found

    def _needed(self, losses: np.ndarray) -> np.ndarray:
        """The log budget at which the envelope has these losses: monotone cubic between, straight on beyond its ends.

        Losses fall ever more slowly, so beyond the ends this tells less of the saving, and more of the waste.
        """
        from scipy.interpolate import PchipInterpolator  # which takes half a second, and few sweeps need

        before = np.fmin.accumulate(np.append(np.inf, self.envelope[:-1]))
        falls = np.isfinite(self.envelope) & (before > self.envelope)
        gain, log_budget = -self.envelope[falls], np.log(self.budgets[falls])
        if len(gain) < 2:
            return np.full_like(losses, np.nan)
        at, slopes = -losses, np.diff(log_budget) / np.diff(gain)
        below, above = np.minimum(at - gain[0], 0) * slopes[0], np.maximum(at - gain[-1], 0) * slopes[-1]
        return PchipInterpolator(gain, log_budget)(np.clip(at, gain[0], gain[-1])) + below + above

    @cached_property
    def rows(self) -> list[Regret]:
        """Of each label at each budget, then in the mean over all of them."""
        rows = []
        for label, regret in self.regrets.items():
            gain = self._needed(self.envelope + regret) - self._needed(self.envelope)
            columns = [(amount, regret[:, k], gain[:, k]) for k, amount in enumerate(self.budgets.tolist())]
            for amount, values, gains in [*columns, (None, regret.mean(1), gain.mean(1))]:
                sound = np.isfinite(values)
                rows.append(Regret(label, amount, values[sound], gains[sound], self.sequential))
        return rows

    def metrics(self, number: int) -> Iterator[tuple[str, float, int]]:
        """MLflow's keys, values and steps (the budgets; 0 for means), of the group of this number."""
        for row in (row for row in self.rows if row.interval):
            found = {"regret": row.values.mean(), "regret_half_width": row.interval and row.interval.half}
            what, group = "" if row.budget else "mean_", f"/{number}" * bool(number)
            for name, value in (found | {"budget_saved": next(iter(row.saved), None)}).items():
                if value is not None:
                    key = f"{what}{name}/{row.arm.replace(':', '.of.')}{group}"
                    yield key, float(value), round(row.budget or 0)

    @cached_property
    def best_schedule(self) -> str | None:
        """The schedule that is lowest over all budgets, on tuning seeds; None where nobody can choose."""
        losses: dict[str, list[list[float]]] = {}
        for trials in self.points:
            tuned = [run for run in trials.runs if run.purpose == "tuning" and run.sound]
            for label in trials.schedules:
                losses.setdefault(label, []).append([run.loss for run in tuned if run.label == label])
        if len(losses) > 1:
            losses = {label: own for label, own in losses.items() if all(own) and len(own) == len(self.points)}
            return min(losses, key=lambda label: np.mean([np.mean(at) for at in losses[label]]), default=None)
        return next(iter(losses), None)

    def minus_schedule(self, label: str) -> Interval | None:
        """A label's mean regret minus that of the best schedule, paired by seed."""
        if self.best_schedule in (None, label):
            return None
        values = (self.regrets[label] - self.regrets[self.best_schedule]).mean(1)
        return Interval.of(sound, self.sequential) if len(sound := values[np.isfinite(values)]) else None


def grouped(points: Iterable[Trials]) -> list[OverBudgets]:
    """Each group of grid points that differ in nothing but the budget."""
    groups: dict[str, list[Trials]] = {}
    for trials in points:
        rest = {key: value for key, value in json.loads(trials.point["grid"]).items() if key != AMOUNT}
        groups.setdefault(", ".join(f"{key} = {value}" for key, value in rest.items()), []).append(trials)
    return [OverBudgets(sorted(own, key=lambda each: each.amount), title) for title, own in groups.items()]


def over_budgets(verdicts: Sequence[Verdict]) -> list[OverBudgets]:
    """Each such group of two budgets or more."""
    return [group for group in grouped(verdict.trials for verdict in verdicts) if len(group.points) > 1]
