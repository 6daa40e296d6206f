"""The criteria of a verdict, a sentence each, and the caveats that withhold one."""

import math
from dataclasses import dataclass
from typing import Any

from esper.pipelines.claims import BETTER, CANNOT_SAY, NOT_BETTER, TIE, WORSE, Claim, holm, in_words
from esper.pipelines.comparison import CONFIDENCE
from esper.pipelines.opponents import NOT_GROWN, Bench, best

SEEDS = 5  # test seeds that a verdict needs at least
UNCHANGED = 1e-3  # nats: a graft leaves the output as it was, so it moves the loss by less
NAMED = 5  # trials without a result that a caveat names one by one


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Attributes:
        criterion: "Mechanics", "Efficiency" or "Transfer".
        sentence: what was found, with its numbers.
        outcome: "met", "not met", "cannot say" or "withheld".
        withheld: the caveats that withhold it.
    """

    criterion: str
    sentence: str
    outcome: str
    withheld: tuple[str, ...] = ()


# -- Caveats -----------------------------------------------------------------------------------------------------


def find_caveats(bench: Bench, point: dict[str, Any], sweep: dict[str, Any]) -> list[str]:
    """What this grid point cannot say, a sentence each; any of them withholds the efficiency verdict."""
    checks = (
        _few_seeds(sweep),
        _edge(bench, sweep),
        None if sweep["rates_tuned"] else "The learning rates of the static sizes were not tuned.",
        _outside(bench, point["spec"]["budget"].get("interior")),
        _untuned_choice(bench, point, sweep),
        _without_result(bench, point["grid"], sweep["trials"]),
    )
    return [caveat for caveat in checks if caveat]


def _few_seeds(sweep: dict[str, Any]) -> str | None:
    seeds = len(sweep["seeds"])
    return f"There are only {seeds} test seeds, and a verdict needs {SEEDS}." if seeds < SEEDS else None


def _edge(bench: Bench, sweep: dict[str, Any]) -> str | None:
    tried = sorted(sweep["sizes"])
    found = {"chosen": bench.size, "best on the test seeds": best(bench.statics)}
    edge = [f"{size} ({how})" for how, size in found.items() if size is not None and size in (tried[0], tried[-1])]
    if not edge:
        return None
    sizes = ", ".join(map(str, tried))
    return (
        f"The best static size, {', '.join(edge)}, is at the edge of those tried ({sizes}): one beyond may be better."
    )


def _outside(bench: Bench, interior: list[float] | None) -> str | None:
    if interior is None:
        return "The preset does not say on which budgets its best static size is an interior one."
    low, high = interior
    if low <= bench.amount <= high:
        return None
    return f"The budget, {bench.amount:,.10g}, is outside the preset's range, {low:,.10g} to {high:,.10g}."


def _untuned_choice(bench: Bench, point: dict[str, Any], sweep: dict[str, Any]) -> str | None:
    open_choice = (point["size"] is None and bench.statics) or (point["schedule"] is None and bench.schedules)
    if sweep["tuning_seeds"] and not open_choice:
        return None
    return "The best static size or schedule was not chosen on tuning seeds; on the test seeds a choice would flatter."


def _without_result(bench: Bench, grid: str, trials: dict[str, dict[str, Any]]) -> str | None:
    missing = {name: t["status"] for name, t in trials.items() if t["grid"] == grid and t["status"] != "done"}
    missing |= {
        run.name: "failed" for run in bench.runs if not run.sound and not run.diverged and run.name not in missing
    }
    if not missing:
        return None
    named = ", ".join(f"{name} ({status})" for name, status in list(missing.items())[:NAMED])
    return f"{len(missing)} trial(s) have no result: {named}{', …' if len(missing) > NAMED else ''}."


# -- Criteria ----------------------------------------------------------------------------------------------------


def mechanics(bench: Bench, timeline: list[dict[str, Any]]) -> Criterion:
    """Whether growing did any harm, over all test and tuning runs.

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
    diverged = [
        f"{run.label} on seed {run.seed}"
        for run in bench.runs
        if run.diverged and run.arm not in NOT_GROWN and run.purpose in ("test", "tuning")
    ]
    sentence = (
        f"{len(grafts)} grafts on {len({graft['run_id'] for graft in grafts})} runs changed the validation loss by at "
        f"most {change:.1e} nats at the graft; {undone} of them were rolled back, of "
        f"{sum(event['event'] == 'rollback' for event in events)} rollbacks in all; {len(diverged)} grown runs diverged"
        f"{': ' if diverged else ''}{', '.join(diverged)}."
    )
    met = change < UNCHANGED and not undone and not diverged
    return Criterion("Mechanics", sentence, "met" if met else "not met")


def efficiency(bench: Bench, claims: list[Claim], caveats: list[str]) -> Criterion:
    """Whether a grown arm ends lower than all its opponents at equal budget.

    An arm's weakest claim counts, so nothing is corrected over its opponents; Holm's method corrects over the arms.
    """
    own = {arm: [claim for claim in claims if claim.arm == arm and claim.axis == bench.axis] for arm in bench.grown}
    joint = holm([max(claim.p for claim in mine) for mine in own.values()])
    ahead = [arm for arm, mine in own.items() if all(claim.outcome == BETTER for claim in mine)]
    winners = [arm for arm, p in zip(own, joint, strict=True) if arm in ahead and p <= 1 - CONFIDENCE]
    unknown = [
        arm
        for arm, mine in own.items()
        if arm not in ahead and all(claim.outcome in (BETTER, CANNOT_SAY) for claim in mine)
    ]
    standings = [
        f"{arm} {_standing(mine)}{', yet not than all of them at once' if arm in ahead and arm not in winners else ''}"
        for arm, mine in own.items()
    ]
    sentence = (
        f"At {bench.amount:,.10g} {bench.axis.replace('_', '-')}, grown arms that end lower than all their opponents: "
        f"{', '.join(winners) or 'none'}; in detail: {'; '.join(standings) or 'there is no grown arm'}."
    )
    if caveats:
        return Criterion("Efficiency", f"Withheld; by the numbers alone: {sentence}", "withheld", tuple(caveats))
    if winners:
        return Criterion("Efficiency", sentence, "met")
    return Criterion("Efficiency", sentence, CANNOT_SAY if unknown or not own else "not met")


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
