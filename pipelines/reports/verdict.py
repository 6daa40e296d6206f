"""The verdict on one grid point: whether growing is harmless, which arm ends lower, and what the data cannot say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from esper.pipelines.common.statistics import CONFIDENCE, POWER
from esper.pipelines.reports.paired_tests import BEST_STATIC, PAIRS, PairedTest, Trials, best, holm, pair
from esper.pipelines.reports.runs import AXES, NEAR, Run
from esper.pipelines.sweeps.arms import STATIC
from esper.pipelines.sweeps.sizes import Size
from esper.platform.console import counted
from esper.platform.host_spec import read_host

UNCHANGED = 1e-3  # nats: a graft leaves the output as it was, so it moves the loss by less
SPEED = 0.05  # by how much the steps that equal measured budgets give to one static size may differ
NAMED = 5  # runs that a sentence names one by one


@dataclass(frozen=True)
class Criterion:
    """Efficiency, Mechanics or Transfer: met, not met, cannot say, or withheld for the reasons given."""

    criterion: str
    sentence: str
    outcome: str
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a sweep says at one grid point."""

    trials: Trials
    tests: list[PairedTest]  # each grown arm, and each control, against each baseline on each axis
    criteria: tuple[Criterion, ...]


def judge(runs: Sequence[Run], point: dict[str, Any], sweep: dict[str, Any]) -> Verdict:
    """Judge one entry of `sweep["points"]` of a `sweep.json`: test runs are compared, tuning runs choose baselines."""
    trials = Trials(runs, point, sweep["arms"], sequential=bool(sweep.get("width")))
    tests = [test for axis in AXES for test in trials.tests(axis)]
    efficient = efficiency(trials, tests, find_caveats(trials, sweep))
    return Verdict(trials, tests, (efficient, mechanics(trials.runs), transfer(trials, sweep.get("policies", {}))))


def efficiency(trials: Trials, tests: Sequence[PairedTest], caveats: Sequence[str]) -> Criterion:
    """Whether a grown arm beats all its baselines at equal budget: its weakest test counts, Holm corrects over arms."""
    by_arm = {arm: [t for t in tests if (t.arm, t.axis) == (arm, trials.axis)] for arm in trials.grown}
    joint = holm([max(test.p for test in own) for own in by_arm.values()])
    outcomes = {arm: {test.outcome[0] for test in own} for arm, own in by_arm.items()}
    winners = [a for a, p in zip(by_arm, joint, strict=True) if outcomes[a] == {"better"} and p <= 1 - CONFIDENCE]
    unknown = any("cannot say" in said <= {"better", "cannot say"} for said in outcomes.values())
    found = [f"at {trials.budget} no arm grew"]
    if by_arm:
        ends = {arm: np.mean([run.loss for run in trials.sound(arm).values()] or [math.inf]) for arm in by_arm}
        first = min(winners or by_arm, key=ends.__getitem__)
        who = f"{', '.join(winners) or 'no grown arm'} {'end' if len(winners) > 1 else 'ends'} lower than all baselines"
        test = next(test for test in by_arm[first] if test.baseline == BEST_STATIC)
        minus = f": {test.interval} nats to the best static size ({trials.best_static})" if test.interval else ""
        if test.detectable is not None:
            pairs = counted(len(test.differences), "pair")
            minus += f"; {pairs} with its spread would show a difference of {test.detectable:.4f} (power {POWER:.0%})"
        found = [f"at {trials.budget} {who}", f"of the grown arms {first} ends lowest{minus}"]
    if trials.sequential:
        found.append("seeds were added on the way, so intervals and p-values are those of a confidence sequence")
    sentence = "; ".join([*found, *(f"{arm} did not grow" for arm in trials.idle)]) + "."
    if caveats:
        return Criterion("Efficiency", f"By the numbers alone, {sentence}", "withheld", tuple(caveats))
    outcome = "met" if winners else "cannot say" if unknown or not by_arm else "not met"
    return Criterion("Efficiency", sentence[0].upper() + sentence[1:], outcome)


def mechanics(runs: Sequence[Run]) -> Criterion:
    """Whether growing did harm: on any test or tuning run a graft moved the loss, a rollback, a grown run diverged."""
    grown = [run for run in runs if run.purpose in ("test", "tuning") and run.grafts]
    if not grown:
        return Criterion("Mechanics", "Whether growing does harm cannot be said: no run grew.", "cannot say")
    grafts = [graft for run in grown for graft in run.summary["grafts"]]
    change = max(moved_by(graft) for graft in grafts)
    undone = sum(graft["outcome"] == "rolled back" for graft in grafts)
    diverged = [f"{run.label} on seed {run.seed}" for run in grown if run.diverged]
    sentence = (
        f"{counted(len(grafts), 'graft')} on {counted(len(grown), 'run')} moved the validation loss by at most "
        f"{change:.1e} nats; {undone or 'none'} of them {'was' if undone < 2 else 'were'} rolled back; "
        f"{counted(len(diverged), 'run')} that had grown diverged{_named(diverged)}."
    )
    met = change < UNCHANGED and not undone and not diverged
    return Criterion("Mechanics", sentence, "met" if met else "not met")


def transfer(trials: Trials, trained_on: dict[str, dict[str, Any]]) -> Criterion:
    """Whether a policy that has grown another kind of network carries over to this one.

    It does where it ends below all static sizes, Holm over such policies, and not above one trained here alone.
    """
    kind = trials.point["spec"]["host"].get("kind", "transformer")
    grown = {label: set(at["hosts"]) for label, at in trained_on.items() if trials.sound(label)}
    foreign = [label for label, kinds in grown.items() if kinds - {kind}]
    native = [label for label, kinds in grown.items() if kinds == {kind} and not trained_on[label]["surrogate"]]
    if not foreign:
        return Criterion("Transfer", "No arm has learned on another kind of network.", "cannot say")
    static = trials.family(foreign, BEST_STATIC, trials.axis)
    outcomes, sentences = set(), []
    for label, own in zip(foreign, static, strict=True):
        tests = {own.against or "a static size": own}
        for other in native:
            test = pair(trials.test[label], trials.test[other], trials.axis, trials.sequential)
            tests[other] = replace(test, p_holm=test.p)
        said = [test.outcome[0] for test in tests.values()]
        known = said[0] == "better" and "cannot say" not in said
        outcomes.add("not met" if "worse" in said else "met" if known else "cannot say")
        minus = ", ".join(f"{test.interval or '–'} to {other} ({test.outcome[0]})" for other, test in tests.items())
        sentences.append(f"{label}, which has grown {' and '.join(trained_on[label]['hosts'])}: {minus}")
    outcome = next((each for each in ("met", "cannot say") if each in outcomes), "not met")
    return Criterion("Transfer", f"At {trials.budget}, in nats: {'; '.join(sentences)}.", outcome)


def moved_by(graft: dict[str, Any]) -> float:
    """By how many nats a graft moved the loss: as evaluated, or at most, as a logit moves a loss by at most twice."""
    if graft.get("identity") is not None:
        return 2 * graft["identity"]
    after = graft["val_loss_after"]
    return math.inf if after is None else abs(after - graft["val_loss_before"])  # None: not finite


def find_caveats(trials: Trials, sweep: dict[str, Any]) -> list[str]:
    """What this grid point cannot say; any caveat withholds the efficiency verdict."""
    seeds, point, caveats, chosen = len(sweep["seeds"]), trials.point, [], {str(trials.best_static)}
    if searched := {size for step in point.get("sizes", ()) for size in step}:
        tried = [size for size in sweep["sizes"] if size in searched]
    else:
        tried = sweep["sizes"]
        chosen.add(str(best(trials.statics)))  # on the test seeds; the search has gone round the first
    if seeds < PAIRS:
        caveats.append(f"The sweep has only {counted(seeds, 'test seed')}, and a verdict takes {PAIRS}.")
    host = read_host(point["spec"]["host"], "the host")
    sizes = {f"{STATIC}-{text}": Size.of(str(text)).numbers(host) for text in tried}
    edge = ", ".join(sorted(label for label in chosen & sizes.keys() if _at_edge(sizes[label], [*sizes.values()])))
    if (smallest := next(iter(sizes))) in chosen and sizes[smallest][0] == 1:
        caveats.append(f"{smallest} is the best static size, and the smallest tried: nothing has to grow here.")
    elif edge:
        caveats.append(f"{edge}, the best static size, is at the edge of those tried: one beyond may be better.")
    if not sweep["rates_tuned"]:
        caveats.append("The rates of the static sizes were not tuned, or the best was the last that was tried.")
    unchosen = [key for key, runs in (("size", trials.statics), ("schedule", trials.schedules)) if runs]
    if not sweep["tuning_seeds"] or any(point.get(key) is None for key in unchosen):
        caveats.append("The best static size or schedule was chosen on the test seeds, which flatters it.")
    return [caveat for caveat in (*caveats, _without_result(trials, sweep["trials"]), _unequal(trials)) if caveat]


def _at_edge(size: tuple[int, ...], tried: Sequence[tuple[int, ...]]) -> bool:
    """Whether none tried is larger, or none smaller, in layers, width or heads alone; nothing is smaller than 1."""
    for part, own in enumerate(size):
        line = {other[part] for other in tried if (*other[:part], own, *other[part + 1 :]) == size}
        if (len(line) > 1 or len(tried) == 1) and (own == max(line) or 1 < own == min(line)):
            return True
    return False


def _without_result(trials: Trials, planned: dict[str, dict[str, Any]]) -> str:
    ended = {run.name for run in trials.runs if run.summary}
    lacking = {run.name: "failed" for run in trials.runs if run.name not in ended}
    for name, trial in planned.items():
        if trial["grid"] == trials.point["grid"] and name not in ended:
            lacking.setdefault(name, "not in MLflow" if trial["status"] == "done" else trial["status"])
    told = _named([f"{name}: {how}" for name, how in lacking.items()])
    return f"{counted(len(lacking), 'trial')} without a result{told}." if lacking else ""


def _unequal(trials: Trials) -> str:
    axis = trials.point["budget"]["axis"]
    runs = [run for run in trials.test_runs() if run.sound]
    if off := [run.name for run in runs if abs(run.summary[axis] / trials.amount - 1) > NEAR]:
        return f"{counted(len(off), 'run')} ended more than {NEAR:.0%} off the budget{_named(off)}."
    for label, seeds in trials.statics.items():
        steps = [run.summary["steps"] for run in seeds.values()]
        if max(steps) > min(steps) * (1 + SPEED):
            span = f"from {min(steps):,} to {max(steps):,} steps, more than {SPEED:.0%} apart"
            return f"Equal measured budgets gave {label} {span}: run fewer trials at once, for an even speed."
    return ""


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join([*names[:NAMED], *(['…'] if len(names) > NAMED else [])])})" if names else ""
