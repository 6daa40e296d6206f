"""The verdict on one grid point: whether growing is harmless, which arm ends lower, and what the data cannot say."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from esper.pipelines.common.statistics import CONFIDENCE
from esper.pipelines.reports.baselines import BASELINES, BEST_STATIC, Trials, best
from esper.pipelines.reports.paired_tests import BETTER, CANNOT_SAY, PAIRS, PairedTest, counted, holm
from esper.pipelines.reports.runs import AXES, NEAR, Run

UNCHANGED = 1e-3  # nats: a graft leaves the output as it was, so it moves the loss by less
SPEED = 0.05  # by how much the steps that equal measured budgets give to one static size may differ
NAMED = 5  # runs that a sentence names one by one


@dataclass(frozen=True)
class Criterion:
    """Mechanics or Efficiency: met, not met, cannot say, or withheld for the reasons given."""

    criterion: str
    sentence: str
    outcome: str
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a sweep says at one grid point."""

    trials: Trials
    tests: tuple[PairedTest, ...]  # each grown arm, and each control, against each baseline on each axis
    criteria: tuple[Criterion, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "grid": self.trials.point["grid"],
            "budget": self.trials.budget,
            "best_static": self.trials.best_static,
            "best_schedule": self.trials.schedule,
            "criteria": [asdict(criterion) for criterion in self.criteria],
            "did_not_grow": self.trials.idle,
            "tests": [test.as_dict() for test in self.tests],
        }


def judge(runs: Sequence[Run], point: dict[str, Any], sweep: dict[str, Any]) -> Verdict:
    """Judge one entry of `sweep["points"]` of a `sweep.json`: test runs are compared, tuning runs choose baselines."""
    order = {label: i for i, label in enumerate(sweep["arms"])}
    # Of a trial that was run again, the ended run sorts last, and counts.
    runs = sorted(runs, key=lambda run: (order.get(run.label, len(order)), run.name, run.status == "FINISHED"))
    trials = Trials(runs, point)
    tests = tuple(test for axis in AXES for baseline in BASELINES for test in trials.tests(baseline, axis))
    return Verdict(trials, tests, (efficiency(trials, tests, find_caveats(trials, sweep)), mechanics(trials.runs)))


def efficiency(trials: Trials, tests: Sequence[PairedTest], caveats: Sequence[str]) -> Criterion:
    """Whether a grown arm beats all its baselines at equal budget: its weakest test counts, Holm corrects over arms."""
    by_arm = {arm: [t for t in tests if (t.arm, t.axis) == (arm, trials.axis)] for arm in trials.grown}
    joint = holm([max(test.p for test in own) for own in by_arm.values()])
    outcomes = {arm: {test.outcome[0] for test in own} for arm, own in by_arm.items()}
    winners = [a for a, p in zip(by_arm, joint, strict=True) if outcomes[a] == {BETTER} and p <= 1 - CONFIDENCE]
    unknown = [arm for arm in by_arm if CANNOT_SAY in outcomes[arm] <= {BETTER, CANNOT_SAY}]
    found = [f"at {trials.budget} no arm grew"]
    if by_arm:
        ends = {arm: np.mean([run.loss for run in trials.sound(arm).values()] or [math.inf]) for arm in by_arm}
        first = min(winners or by_arm, key=ends.__getitem__)
        who = f"{', '.join(winners) or 'no grown arm'} {'end' if len(winners) > 1 else 'ends'} lower than all baselines"
        interval = next(test.interval for test in by_arm[first] if test.baseline == BEST_STATIC)
        minus = f": {interval} nats to the best static size ({trials.best_static})" if interval else ""
        found = [f"at {trials.budget} {who}", f"of the grown arms {first} ends lowest{minus}"]
    for arm, same in trials.idle.items():
        found.append(f"{arm} did not grow{f': its runs are those of {same} to the bit' if same else ''}")
    sentence = "; ".join(found) + "."
    if caveats:
        return Criterion("Efficiency", f"By the numbers alone, {sentence}", "withheld", tuple(caveats))
    outcome = "met" if winners else CANNOT_SAY if unknown or not by_arm else "not met"
    return Criterion("Efficiency", sentence[0].upper() + sentence[1:], outcome)


def mechanics(runs: Sequence[Run]) -> Criterion:
    """Whether growing did harm: on any test or tuning run a graft moved the loss, a rollback, a grown run diverged."""
    runs = [run for run in runs if run.purpose in ("test", "tuning")]
    grafts = [graft for run in runs for graft in run.summary.get("grafts", ())]
    if not grafts:
        return Criterion("Mechanics", "Whether growing does harm cannot be said: no run grew.", CANNOT_SAY)
    changes = [abs(graft["val_loss_after"] - graft["val_loss_before"]) for graft in grafts]
    change = max(changes) if all(map(math.isfinite, changes)) else math.inf  # max() alone would let a NaN pass
    undone = sum(graft["outcome"] == "rolled back" for graft in grafts)
    grown = [f"{run.label} on seed {run.seed}" for run in runs if run.diverged and run.grafts]
    others = [f"{run.label} on seed {run.seed}" for run in runs if run.diverged and not run.grafts]
    grafted = f"{counted(len(grafts), 'graft')} on {counted(sum(run.grafts > 0 for run in runs), 'run')}"
    moved = (
        f"moved the validation loss by at most {change:.1e} nats" if change else "left the validation loss as it was"
    )
    parts = [
        f"{grafted} {moved}",
        f"{undone or 'none'} of them {'was' if undone < 2 else 'were'} rolled back",
        f"{counted(len(grown), 'run')} that had grown diverged{_named(grown)}",
    ]
    if others:
        parts.append(f"{counted(len(others), 'run')} that had not grown did{_named(others)}")
    met = change < UNCHANGED and not undone and not grown
    return Criterion("Mechanics", "; ".join(parts) + ".", "met" if met else "not met")


def find_caveats(trials: Trials, sweep: dict[str, Any]) -> list[str]:
    """What this grid point cannot say; any caveat withholds the efficiency verdict."""
    seeds, point, caveats = len(sweep["seeds"]), trials.point, []
    if seeds < PAIRS:
        caveats.append(f"The sweep has only {counted(seeds, 'test seed')}, and a verdict takes {PAIRS}.")
    caveats.append(_edge(trials, sorted(sweep["sizes"])))
    if not sweep["rates_tuned"]:
        caveats.append(
            "The learning rates of the static sizes were not tuned, or the best was the last that was tried."
        )
    unchosen = (point["size"] is None and trials.statics) or (point["schedule"] is None and trials.schedules)
    if unchosen or not sweep["tuning_seeds"]:
        what = "The best static size or schedule was chosen on the test seeds, not on tuning seeds"
        caveats.append(f"{what}: that flatters it.")
    caveats += [_without_result(trials, sweep["trials"]), _unequal(trials)]
    return [caveat for caveat in caveats if caveat]


def _edge(trials: Trials, tried: Sequence[int]) -> str:
    lowest = best(trials.statics)
    on_test = trials.size(lowest) if lowest else None
    found = {"chosen": trials.point["size"] or on_test, "best on the test seeds": on_test}
    for size in (*tried[:1], *tried[-1:]):
        if hows := [how for how, of in found.items() if of == size]:
            who = f"The best static size, {counted(size, 'layer')} ({' and '.join(hows)}),"
            if size == 1:
                return f"{who} is the smallest there is: at this budget nothing has to grow. Take a larger budget."
            return f"{who} is at the edge of those tried ({', '.join(map(str, tried))}): one beyond may be better."
    return ""


def _without_result(trials: Trials, planned: dict[str, dict[str, Any]]) -> str:
    ended = {run.name for run in trials.runs if run.sound or run.diverged}
    lacking = {run.name: "failed" for run in trials.runs if run.name not in ended}
    for name, trial in planned.items():
        if trial["grid"] == trials.point["grid"] and name not in ended:
            lacking.setdefault(name, "not in MLflow" if trial["status"] == "done" else trial["status"])
    told = _named([f"{name}: {how}" for name, how in lacking.items()])
    return f"{counted(len(lacking), 'trial')} without a result{told}." if lacking else ""


def _unequal(trials: Trials) -> str:
    axis = trials.point["budget"]["axis"]
    runs = [run for run in trials.test_runs() if run.sound]
    if off := [run.name for run in runs if abs(run.final(axis) / trials.amount - 1) > NEAR]:
        return f"{counted(len(off), 'run')} ended more than {NEAR:.0%} off the budget{_named(off)}."
    for label, seeds in trials.statics.items():
        steps = [run.final("steps") for run in seeds.values()]
        if max(steps) > min(steps) * (1 + SPEED):
            span = f"from {min(steps):,.0f} to {max(steps):,.0f} steps, more than {SPEED:.0%} apart"
            why = "the machine was not always as fast. Run fewer trials at once."
            return f"Equal measured budgets gave {label} {span}: {why}"
    return ""


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})" if names else ""
