"""What a report says, before it is a page: the verdicts, their tables, and what the controller cost."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.baselines import BEST_STATIC, Trials, draw_envelope
from esper.pipelines.reports.paired_tests import counted, pair
from esper.pipelines.reports.runs import NEAR, Run, tables
from esper.pipelines.reports.store import Sweep
from esper.pipelines.reports.verdict import Verdict

AXIS_NAMES = {"parameter_seconds": "parameter-seconds", "flops": "FLOPs", "seconds": "seconds", "tokens": "tokens"}
CONTROLLED = ("ppo", "openloop")  # arms that a controller's training has to be paid for
COUNTED = {
    "rates": "the search for rates",
    "tuning": "tuning runs",
    "controller": "the controller's training (with forks, and episodes dropped or in flight at its end)",
}


@dataclass(frozen=True)
class Report:
    """Everything that is shown; `notes` tells what was left out, in sentences."""

    sweep: Sweep
    verdicts: list[Verdict]
    notes: list[str]
    runs: list[Run]

    def as_dict(self) -> dict[str, Any]:
        """`report.json`."""
        return {
            "experiment": self.sweep.experiment,
            "sweep": self.sweep.name,
            "verdicts": [
                verdict.as_dict() | {"arms": _records(arm_table(verdict)), "payback": payback(self, verdict.trials)}
                for verdict in self.verdicts
            ],
            "notes": self.notes,
            "provenance": {"MLflow": self.sweep.where, "started": self.sweep.started, **self.sweep.tags},
            "finals": _records(tables(self.runs).finals),
        }


def _records(frame: pd.DataFrame) -> Any:
    """Rows as JSON values."""
    return json.loads(json.dumps(frame.astype(object).where(frame.notna(), None).to_dict("records"), default=str))


# -- Tables ------------------------------------------------------------------------------------------------------------


def arm_table(verdict: Verdict) -> pd.DataFrame:
    """A row per label: what it reached, against the best static size, its size and its cost; means over sound runs."""
    trials, base, rows = verdict.trials, verdict.trials.sound(verdict.trials.best_static), []
    outcomes = {t.arm: t.outcome[0] for t in verdict.tests if (t.baseline, t.axis) == (BEST_STATIC, trials.axis)}
    for label, seeds in trials.test.items():
        runs = list(trials.sound(label).values())
        loss = str(Interval.of(np.array([run.loss for run in runs]))).removeprefix("+") if runs else None
        difference = pair(seeds, base, trials.axis).interval if base and label != trials.best_static else None
        row = {"arm": label, "seeds": len(runs), "diverged": sum(run.diverged for run in seeds.values())}
        row |= {"final loss": loss, f"minus {trials.best_static}": difference}
        row[""] = outcomes.get(label, "did not grow" if label in trials.idle else "")
        for what, name in (AXIS_NAMES | {what: what for what in ("parameters", "layers", "grafts")}).items():
            row[name] = float(np.mean([run.final(what) for run in runs])) if runs else None
        rows.append(row)
    return pd.DataFrame(rows)


def test_table(verdict: Verdict, *, own: bool) -> pd.DataFrame:
    """A row per arm, baseline and axis: the budget's own axis, or the others."""
    return pd.DataFrame(
        {
            "arm": test.arm,
            "against": f"{test.baseline}{f': {test.against}' if test.against else ''}",
            "at equal": AXIS_NAMES[test.axis],
            "difference": test.interval,
            "": test.outcome[0],
            "pairs": len(test.differences),
            "p (Holm)": f"{test.p_holm:.2g}",
            "why": test.outcome[1],
        }
        for test in verdict.tests
        if (test.axis == verdict.trials.axis) == own
    )


def growth_table(trials: Trials) -> pd.DataFrame:
    """Each change of a network on the test seeds: when, where, what, and what became of it."""
    changes = tables(trials.test_runs()).timeline.drop(columns=["run_id", "arm", "size", "purpose", "grid"])
    return changes.rename(columns=lambda name: name.replace("_", " "))


def seed_table(trials: Trials) -> pd.DataFrame:
    """The final loss of every label on every test seed."""
    finals = tables(trials.test_runs()).finals
    return finals.pivot_table("val_loss", "label", "seed", sort=False).reset_index().rename(columns=str)


def trouble_table(report: Report) -> pd.DataFrame:
    """Trials that failed, never ran or diverged."""
    trials = report.sweep.record.get("trials", {}).items()
    rows = [(n, t["status"], t.get("error")) for n, t in trials if t.get("status") in ("failed", "missing")]
    rows += [(run.name, "diverged", run.summary.get("failure")) for run in report.runs if run.diverged]
    return pd.DataFrame(rows, columns=["trial", "what happened", "said"])


# -- Sentences ---------------------------------------------------------------------------------------------------------


def payback(report: Report, trials: Trials) -> list[str]:
    """What the controller cost, and after how many uses it has paid; nothing where none was trained."""
    labels = [label for label, arm in trials.arms.items() if arm in CONTROLLED and trials.sound(label)]
    if not labels or not trials.point.get("controller", report.sweep.record.get("controller")):
        return []
    found: dict[str, Any] = trials.point.get("spent") or {}
    spent: dict[str, Any] = {part: (costs or {}).get("parameter_seconds") for part, costs in found.items()}
    if spent.get("controller") is None or None in spent.values():
        return ["What the controller and the tuning that it rests on cost is not known: nor is when it has paid."]
    total, envelope = sum(spent.values()), draw_envelope(trials.statics, "parameter_seconds")
    parts = ", ".join(f"{short(cost)} for {COUNTED.get(part, part)}" for part, cost in spent.items() if cost)
    told = f"The controller cost {short(total)} parameter-seconds that no arm's budget contains: {parts}."
    return [told, *(f"{label} {_paid(list(trials.sound(label).values()), total, *envelope)}." for label in labels)]


def _paid(runs: list[Run], spent: float, costs: np.ndarray, losses: np.ndarray) -> str:
    """After how many uses one label has paid: by the parameter-seconds that static sizes need for the same loss."""
    loss, used = (float(np.mean([run.final(what) for run in runs])) for what in ("val_loss", "parameter_seconds"))
    ended = f"ends at {loss:.4f} after {short(used)} parameter-seconds"
    if not len(costs) or (losses[-1] > loss and costs[-1] <= used * (1 + NEAR)):
        return f"{ended}, below every static run; none was trained longer: what a use saves cannot be said"
    needed = float(np.exp(np.interp(-loss, -losses, np.log(costs))))  # linear in log cost
    least, most = ("more than ", "at most ") if losses[-1] > loss else ("", "")
    needs = f"{ended}; the best static sizes need {least}{short(needed)} for that loss: a use saves"
    if needed <= used:
        return f"{needs} nothing"
    uses = counted(math.ceil(spent / (needed - used)), "use")
    return f"{needs} {least}{short(needed - used)}, and the cost is paid back after {most}{uses}"


def short(value: float) -> str:
    """A number with four digits: 12.35, 1,234, 1.02M."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
