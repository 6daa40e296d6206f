"""What a report says, as JSON and as one HTML file that needs nothing else: no network, no script."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from esper import __version__
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
                verdict.as_dict() | {"arms": _records(arm_table(verdict)), "payback": payback(verdict.trials)}
                for verdict in self.verdicts
            ],
            "notes": self.notes,
            "provenance": {"MLflow": self.sweep.where, "started": self.sweep.started, **self.sweep.run.data.tags},
            "finals": _records(tables(self.runs).finals),
        }


def html(report: Report) -> str:
    """The page."""
    from esper.pipelines.reports.figures import svgs

    files = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["told"] = told
    content = {"arm_table": arm_table, "payback": payback, "tables": tables, "svgs": svgs, "AXIS_NAMES": AXIS_NAMES}
    return environment.get_template("report.html").render(report=report, version=__version__, **content)


def arm_table(verdict: Verdict) -> pd.DataFrame:
    """A row per label: loss, difference to the best static size, size and cost; means over sound runs."""
    trials, base, rows = verdict.trials, verdict.trials.sound(verdict.trials.best_static), []
    outcomes = {t.arm: t.outcome[0] for t in verdict.tests if (t.baseline, t.axis) == (BEST_STATIC, trials.axis)}
    for label, seeds in trials.test.items():
        runs, other = list(trials.sound(label).values()), base if label != trials.best_static else {}
        row: dict[str, Any] = {
            "arm": label,
            "seeds": len(runs),
            "diverged": sum(run.diverged for run in seeds.values()),
            "final loss": str(Interval.of(np.array([run.loss for run in runs])))[1:] if runs else None,
            f"minus {trials.best_static}": pair(seeds, other, trials.axis).interval if other else None,
            "": outcomes.get(label, "did not grow" if label in trials.idle else ""),
        }
        for what in (*AXIS_NAMES, "parameters", "layers", "grafts"):
            row[AXIS_NAMES.get(what, what)] = float(np.mean([run.final(what) for run in runs])) if runs else None
        rows.append(row)
    return pd.DataFrame(rows)


def payback(trials: Trials) -> list[str]:
    """The controller's cost, and the number of uses that pay for it; empty where none was trained."""
    labels = [label for label, arm in trials.arms.items() if arm in CONTROLLED and trials.sound(label)]
    if not labels or not trials.point.get("controller"):
        return []
    parts = {part: (costs or {}).get("parameter_seconds") for part, costs in (trials.point.get("spent") or {}).items()}
    spent = {part: cost for part, cost in parts.items() if cost is not None}
    if spent.keys() != parts.keys() or "controller" not in spent:
        return ["What the controller and the tuning that it rests on cost is not known: nor is when it has paid."]
    total, envelope = sum(spent.values()), draw_envelope(trials.statics.values(), "parameter_seconds")
    told = ", ".join(f"{short(cost)} for {COUNTED.get(part, part)}" for part, cost in spent.items() if cost)
    cost = f"The controller cost {short(total)} parameter-seconds that no arm's budget contains: {told}."
    return [cost, *(f"{label} {_paid(list(trials.sound(label).values()), total, *envelope)}." for label in labels)]


def _paid(runs: list[Run], spent: float, costs: np.ndarray, losses: np.ndarray) -> str:
    # By the parameter-seconds that static sizes need for the same loss.
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


def told(value: Any) -> str:
    """A table's value in words; a dash for what is missing."""
    if value is None or value is pd.NA or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 and value != round(value) else short(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _records(frame: pd.DataFrame) -> Any:
    return json.loads(json.dumps(frame.astype(object).where(frame.notna(), None).to_dict("records"), default=str))
