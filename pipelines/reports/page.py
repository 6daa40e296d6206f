"""What a report says, as JSON and as one HTML file that needs nothing else: no network, no script."""

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from esper import __version__
from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.budgets import OverBudgets, over_budgets
from esper.pipelines.reports.paired_tests import BEST_STATIC, Trials, draw_envelope, pair
from esper.pipelines.reports.runs import AXES, Sweep, tables
from esper.pipelines.reports.verdict import Verdict
from esper.pipelines.sweeps.arms import STATIC
from esper.pipelines.sweeps.search import Setting
from esper.platform.console import counted

CONTROLLED = ("ppo", "openloop")  # labels that the controller's training has to be paid for
COUNTED = {
    "rates": "the search for rates",
    "tuning": "tuning runs",
    "controller": "the controller's training (with forks, and episodes dropped or in flight at its end)",
}
MEANS = [*AXES, "parameters", "layers", "grafts"]  # of a run, whose means are told


def as_dict(sweep: Sweep, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """`report.json`."""
    points = []
    for verdict in verdicts:
        trials = verdict.trials
        point = {"grid": trials.point["grid"], "budget": trials.budget, "did_not_grow": trials.idle}
        point |= {"best_static": trials.best_static, "best_schedule": trials.schedule, "payback": payback(trials)}
        point |= {"criteria": [asdict(criterion) for criterion in verdict.criteria]}
        points.append(point | {"tests": [t.as_dict() for t in verdict.tests], "arms": _records(arm_table(verdict))})
    told = {"experiment": sweep.experiment, "sweep": sweep.name, "verdicts": points}
    told["budgets"] = [{"grid": o.title, "rows": [row.as_dict() for row in o.rows]} for o in over_budgets(verdicts)]
    return told | {"provenance": sweep.provenance, "finals": _records(tables(sweep.runs).finals)}


def html(sweep: Sweep, verdicts: Sequence[Verdict]) -> str:
    """The page."""
    from esper.pipelines.reports.figures import save_picture  # matplotlib takes a second

    def picture(drawn: Trials | OverBudgets) -> str:
        save_picture([drawn], file := io.BytesIO(), "svg")
        return base64.b64encode(file.getvalue()).decode()  # so that ids of two pictures cannot collide

    files = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["told"] = told
    own = (arm_table, budget_tables, effort, payback, samples, tables, picture)
    environment.globals |= {function.__name__: function for function in own}
    page = environment.get_template("report.html")
    overs = over_budgets(verdicts)
    return page.render(sweep=sweep, verdicts=verdicts, overs=overs, version=__version__, AXES=AXES)


def arm_table(verdict: Verdict) -> pd.DataFrame:
    """A row per label: loss (and accuracy), difference to the best static size, size, cost; means over sound runs."""
    trials, rows = verdict.trials, []
    told = any("accuracy" in run.summary for seeds in trials.test.values() for run in seeds.values())
    ends = {"final loss": "val_loss"} | ({"accuracy": "accuracy"} if told else {})
    base, outcomes = trials.sound(trials.best_static), dict.fromkeys(trials.idle, "did not grow")
    outcomes |= {t.arm: t.outcome[0] for t in verdict.tests if (t.baseline, t.axis) == (BEST_STATIC, trials.axis)}
    for label, seeds in trials.test.items():
        runs = list(trials.sound(label).values())
        other = base if label != trials.best_static else {}
        minus = pair(seeds, other, trials.axis, trials.sequential).interval if other else None
        row = {"arm": label, "seeds": len(runs), "diverged": sum(run.diverged for run in seeds.values())}
        for name, key in ends.items():
            values = np.array([run.summary[key] for run in runs])
            row[name] = str(Interval.of(values, trials.sequential))[1:] if runs else None
        row |= {f"minus {trials.best_static}": minus and str(minus), "outcome": outcomes.get(label)}
        means = pd.DataFrame([run.summary | {"grafts": run.grafts} for run in runs], columns=MEANS).mean()
        rows.append(row | means.rename(AXES).to_dict())
    return pd.DataFrame(rows)


def budget_tables(over: OverBudgets) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Regrets, and the parts of budgets saved: a row per label, a column per budget and for their mean."""
    regret: dict[str, dict[str, str]] = {}
    saved: dict[str, dict[str, str]] = {}
    for row in over.rows:
        at, (cell, least, part) = short(row.budget) if row.budget else "mean", row.cells()
        regret.setdefault(row.arm, {"arm": row.arm})[at] = cell
        saved.setdefault(row.arm, {"arm": row.arm})[at] = part
        if row.budget is None:
            best = over.best_schedule
            minus = {f"minus {best}": str(over.minus_schedule(row.arm) or "–")} if best else {}
            regret[row.arm] |= {"would show": least, **minus, "budget saved": part}
    return pd.DataFrame([*regret.values()]), pd.DataFrame([*saved.values()])


def short_tables(verdicts: Sequence[Verdict]) -> list[str]:
    """For a terminal: regrets over the budgets, or, at one budget, the arms."""
    overs = over_budgets(verdicts)
    found = [(f"{over.title} regret over budgets, nats".strip(), budget_tables(over)[0]) for over in overs]
    found = found or [(verdict.trials.title, arm_table(verdict).loc[:, :"outcome"]) for verdict in verdicts]
    frames = [(title, frame.astype(object).to_string(index=False, na_rep="–")) for title, frame in found if len(frame)]
    return ["\n".join(filter(None, part)) for part in frames]


def samples(trials: Trials) -> list[tuple[str, str]]:
    """What the first sound run of each arm wrote; empty on images."""
    firsts = [(label, run) for label in trials.test for run in [*trials.sound(label).values()][:1]]
    return [(label, run.summary["sample"]) for label, run in firsts if "sample" in run.summary]


def payback(trials: Trials) -> list[str]:
    """The controller's cost, and the number of uses that pay for it; empty where none was trained."""
    labels = [label for label in CONTROLLED if trials.sound(label)]
    if not labels or not trials.point.get("controller"):
        return []
    spent: dict[str, Any] = trials.point.get("spent") or {}
    if "controller" not in spent or not all(spent.values()):
        return ["What the controller and the tuning that it rests on cost is not known: nor is when it has paid."]
    parts = {COUNTED[part]: axes["parameter_seconds"] for part, axes in spent.items() if axes["parameter_seconds"]}
    total, counts = sum(parts.values()), ", ".join(f"{told(cost)} for {part}" for part, cost in parts.items())
    sentences = [f"The controller cost {told(total)} parameter-seconds that no arm's budget contains: {counts}."]
    costs, losses = draw_envelope(trials.statics.values(), "parameter_seconds")
    for label in labels:
        ends = [(run.loss, run.summary["parameter_seconds"]) for run in trials.sound(label).values()]
        loss, used = np.mean(ends, axis=0).tolist()
        if not len(costs) or losses[-1] > loss:
            then = "no static run ends as low: what a use saves cannot be said"
        else:
            saved = float(np.exp(np.interp(-loss, -losses, np.log(costs)))) - used  # linear in log cost
            uses = counted(math.ceil(total / saved), "use") if saved > 0 else ""
            then = f"the best static sizes need {told(used + saved)} for that loss: "
            then += f"the cost is paid back after {uses}" if uses else "a use saves nothing"
        sentences.append(f"{label} ends at {loss:.4f} after {told(used)} parameter-seconds; {then}.")
    return sentences


def effort(record: dict[str, Any], point: dict[str, Any]) -> list[str]:
    """Each arm's rate (a growing arm's is a factor), where it starts to fall, sizes tried, and what all that took."""
    trials = [trial for trial in record["trials"].values() if trial["grid"] == point["grid"]]
    tries = Counter((trial["label"], trial["purpose"]) for trial in trials)
    runs, found = Counter(trial["purpose"] for trial in trials), []
    for label, at in point.get("settings", {}).items():
        sign = "" if label.startswith(STATIC) else "×"
        found.append(f"{label} {sign}{Setting(*at)} ({counted(tries[label, 'rates'], 'run')})")
    if sizes := [size for step in point.get("sizes", ()) for size in step]:
        found.append(f"sizes tried, the best of which and its neighbours were tested: {', '.join(sizes)}")
    axis = point["budget"]["axis"]
    spent = [
        f"{counted(runs[part], 'run')} and {told(point['spent'][part][axis])} for {COUNTED[part]}"
        for part in ("rates", "tuning")
    ]
    return [*found, f"{axis.replace('_', '-')}: {', '.join(spent)}"]


def told(value: Any) -> str:
    """A value in words: a dash for what is missing, and numbers as 1.2300, 1,234 or 1.23e+09."""
    if value is None or value != value:
        return "–"
    if isinstance(value, str):
        return value
    if abs(value) >= 1e8:
        return f"{value:.3g}"
    return f"{float(value):.4f}" if abs(value) < 100 and value % 1 else f"{float(value):,.0f}"


def short(amount: float) -> str:
    """A budget in a few letters: 500k, 1.5M."""
    power = max(0, min(5, int(math.log10(amount) // 3)))
    return f"{amount / 1000**power:g}{' kMGTP'[power].strip()}"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
