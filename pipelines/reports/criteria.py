"""The criteria of a verdict, a sentence each, and the caveats that withhold one."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.pipelines.common.statistics import CONFIDENCE
from esper.pipelines.reports.claims import BETTER, CANNOT_SAY, NOT_BETTER, TIE, WORSE, Claim, holm, in_words
from esper.pipelines.reports.envelope import TrialRun, sound
from esper.pipelines.reports.opponents import ENVELOPE, FINAL_SIZE, SCHEDULE, Bench, best

SEEDS = 5  # test seeds that a verdict needs at least
UNCHANGED = 1e-3  # nats: a graft leaves the output as it was, so it moves the loss by less
OPPONENTS_TOLD = {
    FINAL_SIZE: "a static one of its final size",
    ENVELOPE: "the best static size",
    SCHEDULE: "the best fixed schedule",
}
NAMED = 5  # trials without a result that a caveat names one by one


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Attributes:
        criterion: "Mechanics", "Efficiency" or "Transfer".
        sentence: what was found.
        outcome: "met", "not met", "cannot say" or "withheld".
        withheld: the caveats that withhold it.
        details: for efficiency, how each grown arm and each random control stands against each opponent.
    """

    criterion: str
    sentence: str
    outcome: str
    withheld: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


# -- Caveats -----------------------------------------------------------------------------------------------------


def find_caveats(bench: Bench, point: dict[str, Any], sweep: dict[str, Any]) -> list[str]:
    """What this grid point cannot say, a sentence each; any of them withholds the efficiency verdict."""
    checks = (
        _few_seeds(sweep),
        _edge(bench, sweep),
        None
        if sweep["rates_tuned"]
        else "The learning rates of the static sizes were not tuned, or the best was the last that was tried.",
        _outside(bench, point["spec"]["budget"].get("interior")),
        _untuned_choice(bench, point, sweep),
        _without_result(bench, point["grid"], sweep["trials"]),
        _by_the_wall(point["spec"]),
    )
    return [caveat for caveat in checks if caveat]


def _few_seeds(sweep: dict[str, Any]) -> str | None:
    seeds = len(sweep["seeds"])
    return f"There are only {seeds} test seeds, and a verdict needs {SEEDS}." if seeds < SEEDS else None


def _edge(bench: Bench, sweep: dict[str, Any]) -> str | None:
    tried = sorted(sweep["sizes"])
    found = {"chosen": bench.size, "best on the test seeds": best(bench.statics)}
    hows: dict[int, list[str]] = {}
    for how, size in found.items():
        if size is not None and size in (tried[0], tried[-1]):
            hows.setdefault(size, []).append(how)
    if not hows:
        return None
    edge = ", ".join(f"{size} ({' and '.join(how)})" for size, how in hows.items())
    sizes = ", ".join(map(str, tried))
    return f"The best static size, {edge}, is at the edge of those tried ({sizes}): one beyond may be better."


def _outside(bench: Bench, interior: list[float] | None) -> str | None:
    if interior is None:
        return "The preset does not say on which budgets its best static size is neither the smallest nor the largest."
    low, high = interior
    if low <= bench.amount <= high:
        return None
    return f"The budget, {bench.budget}, is outside the preset's range, {low:,.10g} to {high:,.10g}."


def _untuned_choice(bench: Bench, point: dict[str, Any], sweep: dict[str, Any]) -> str | None:
    open_choice = (point["size"] is None and bench.statics) or (point["schedule"] is None and bench.schedules)
    if sweep["tuning_seeds"] and not open_choice:
        return None
    return "The best static size or schedule was not chosen on tuning seeds; on the test seeds a choice would flatter."


def _without_result(bench: Bench, grid: str, trials: dict[str, dict[str, Any]]) -> str | None:
    missing = {name: t["status"] for name, t in trials.items() if t["grid"] == grid and t["status"] != "done"}
    logged = {run.name for run in bench.runs}
    here = {name for name, trial in trials.items() if trial["grid"] == grid}
    missing |= dict.fromkeys(here - logged - set(missing), "not in MLflow")
    missing |= {
        run.name: "failed" for run in bench.runs if not run.sound and not run.diverged and run.name not in missing
    }
    if not missing:
        return None
    named = ", ".join(f"{name} ({status})" for name, status in list(missing.items())[:NAMED])
    return f"{len(missing)} trial(s) have no result: {named}{', …' if len(missing) > NAMED else ''}."


def _by_the_wall(spec: dict[str, Any]) -> str | None:
    if spec.get("clock", {}).get("kind") != "wall":
        return None
    return "Seconds were measured (wall clock) while other trials may have run beside: budgets may not be equal."


# -- Criteria ----------------------------------------------------------------------------------------------------


def mechanics(bench: Bench, timeline: list[dict[str, Any]]) -> Criterion:
    """Whether growing did any harm, over all test and tuning runs, whoever chose the grafts.

    Not met where a graft moved the loss or was rolled back, or a run diverged that had grown. A run that diverged
    without a graft is told of, but says nothing of growing.

    Args:
        bench: the runs.
        timeline: rows of `Tables.timeline` at this grid point.
    """
    events = [event for event in timeline if event["purpose"] in ("test", "tuning")]
    grafts = [event for event in events if event["event"] == "graft"]
    if not grafts:
        return Criterion("Mechanics", "Whether growing does harm cannot be said: no run grew.", CANNOT_SAY)
    changes = [abs(graft["val_loss_after"] - graft["val_loss_before"]) for graft in grafts]
    # max() alone would let a NaN pass.
    change = math.inf if not all(map(math.isfinite, changes)) else max(changes)
    undone = sum(graft["outcome"] == "rolled back" for graft in grafts)
    diverged = [run for run in bench.runs if run.diverged and run.purpose in ("test", "tuning")]
    grown = [run for run in diverged if run.final["grafts"] > 0]
    others = [run for run in diverged if not run.final["grafts"] > 0]
    moved = (
        f"moved the validation loss by at most {change:.1e} nats" if change else "left the validation loss as it was"
    )
    parts = [
        f"{len(grafts)} grafts on {len({graft['run_id'] for graft in grafts})} runs {moved}",
        f"{undone or 'none'} of them {'was' if undone == 1 else 'were'} rolled back",
        _told_diverged(grown) or "no run that had grown diverged",
    ]
    if others:
        parts.append(f"{_told_diverged(others)}, without a graft, which says nothing of growing")
    met = change < UNCHANGED and not undone and not grown
    return Criterion("Mechanics", "; ".join(parts) + ".", "met" if met else "not met")


def _told_diverged(runs: list[TrialRun]) -> str:
    named = [f"{run.label} on seed {run.seed}" for run in runs[:NAMED]] + ["…"] * (len(runs) > NAMED)
    return f"{len(runs)} run(s) diverged ({', '.join(named)})" if runs else ""


def efficiency(bench: Bench, claims: list[Claim], caveats: list[str]) -> Criterion:
    """Whether a grown arm ends lower than all its opponents at equal budget; random controls are told of only.

    An arm's weakest claim counts, so nothing is corrected over its opponents; Holm's method corrects over the arms.
    """
    by_arm = {
        arm: [claim for claim in claims if claim.arm == arm and claim.axis == bench.axis]
        for arm in (*bench.grown, *bench.controls)
    }
    own = {arm: by_arm[arm] for arm in bench.grown}
    joint = holm([max(claim.p for claim in mine) for mine in own.values()])
    ahead = [arm for arm, mine in own.items() if all(c.outcome == BETTER and c.seeds >= SEEDS for c in mine)]
    winners = [arm for arm, p in zip(own, joint, strict=True) if arm in ahead and p <= 1 - CONFIDENCE]
    unknown = [
        arm
        for arm, mine in own.items()
        if arm not in ahead and all(claim.outcome in (BETTER, CANNOT_SAY) for claim in mine)
    ]
    details = []
    for arm, mine in by_arm.items():
        control = " (a control: it cannot win)" if arm in bench.controls else ""
        unsure = ", yet not than all of them at once" if arm in ahead and arm not in winners else ""
        details.append(f"{arm}{control} {_standing(mine)}{unsure}.")
    found = _found(bench, own, winners)
    sentence = f"By the numbers alone, {found}" if caveats else found[0].upper() + found[1:]
    if caveats:
        outcome = "withheld"
    elif winners:
        outcome = "met"
    else:
        outcome = CANNOT_SAY if unknown or not own else "not met"
    return Criterion("Efficiency", sentence, outcome, tuple(caveats), tuple(details))


def _found(bench: Bench, own: dict[str, list[Claim]], winners: list[str]) -> str:
    """Who wins, and the numbers of the one that ends lowest."""
    if not own:
        return f"at {bench.budget} there is no grown arm."
    ends = {arm: np.mean([run.loss for run in sound(bench.test[arm]).values()] or [math.inf]) for arm in own}
    first = min(winners or own, key=ends.__getitem__)
    if winners:
        one = len(winners) == 1
        found = (
            f"{', '.join(winners)} {'ends' if one else 'end'} lower than all of {'its' if one else 'their'} opponents"
        )
    else:
        found = "no grown arm ends lower than all of its opponents"
    numbers = [_number(claim) for claim in own[first]]
    whose = "its" if winners == [first] else f"the grown arm that ends lowest is {first}, whose"
    return f"at {bench.budget} {found}; {whose} final loss minus that of {', minus that of '.join(numbers)}."


def _number(claim: Claim) -> str:
    """`the best static size (static-2) is +0.0030 [-0.0100, +0.0160] nats`."""
    who = OPPONENTS_TOLD[claim.opponent]
    against = f" ({claim.against})" if claim.against else ""
    return f"{who}{against} {f'is {in_words(claim.interval)} nats' if claim.interval else 'is not known'}"


def _standing(claims: list[Claim]) -> str:
    """One arm against each of its opponents, in words."""
    said = {BETTER: "is better than", WORSE: "loses to", TIE: "ties with", NOT_BETTER: "is not better than"}
    parts = []
    for claim in claims:
        against = claim.against or f"the {claim.opponent}"
        numbers = f"{in_words(claim.interval)}, {claim.seeds} pairs" if claim.interval else ""
        inner = "; ".join(filter(None, [numbers, claim.reason]))
        phrase = said.get(claim.outcome, "cannot be compared with")
        parts.append(f"{phrase} {against}{f' ({inner})' if inner else ''}")
    return ", ".join(parts)
