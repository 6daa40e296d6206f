"""One episode under one policy: the loop that every arm goes through."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from esper.platform.checkpoint import CheckpointStore, Content
from esper.platform.console import counted
from esper.platform.contracts import GraftAction, GrowthPolicy, Planned, Stateful
from esper.platform.telemetry import Telemetry
from esper.workers.episode import Episode, perplexity
from esper.workers.run import GrowthRun

R = TypeVar("R", bound=Episode)
OnDecision = Callable[[R, Telemetry, GraftAction], None]  # what was seen, and what was done


def play(run: R, policy: GrowthPolicy, *, arm: str, on_decision: OnDecision[R] | None = None) -> dict[str, Any]:
    """Play an episode from where it stands (reset or restored) to its end; returns its summary."""
    while not run.ended:
        telemetry = run.telemetry
        if run.unfinished:  # restored from within a slice, whose action has been taken
            action = GraftAction(0, telemetry.sequence)
            run.finish()
        else:
            action = policy.act(telemetry, run)
            run.step(action)
        if on_decision is not None:
            on_decision(run, telemetry, action)
    return {"arm": arm, **run.summary(), "unplayed": policy.unplayed() if isinstance(policy, Planned) else []}


def take_up(run: GrowthRun, policy: GrowthPolicy, saved: Content | None, seed: int) -> None:
    """Bring a run and its policy to where `saved` left them; to the start of the seed's episode for None."""
    if saved is None:
        run.reset(seed=seed)
        return
    run.load(*saved)
    if isinstance(policy, Stateful):
        policy.resume(saved[0]["policy"])


def save(run: GrowthRun, policy: GrowthPolicy, store: CheckpointStore, name: str) -> None:
    """Save what `take_up` needs."""
    state, tensors = run.state()
    state["policy"] = policy.state() if isinstance(policy, Stateful) else None
    store.save(name, state, tensors)


def unplayed(summary: Mapping[str, Any]) -> str | None:
    """What to say of planned grafts that have not been played; None where all have."""
    if not summary["unplayed"] or summary["diverged"]:
        return None
    return (
        f"planned and not played: {', '.join(summary['unplayed'])}; a graft waits for those before it, and for "
        "growth.max_layers, growth.max_parameters and growth.min_optimizer_steps to allow it (fewer decisions or a "
        "larger budget help); none comes while the rate decays"
    )


def barren(run: Episode) -> str | None:
    """What to say at the start of a run in which no graft can ever be legal; None where some may be."""
    layout, clock, spec = run.layout, run.clock, run.spec
    within = layout.least_steps[1:] < float("inf")
    if not within.any():
        return "nothing would ever be grafted: growth.max_layers, growth.max_parameters and blueprints allow nothing"
    most = clock.amount / clock.decisions / layout.axis_per_step[1:][within].min()
    if most >= spec.growth.min_optimizer_steps or not spec.clock.foretells(spec.budget.axis):
        return None
    return (
        f"a decision holds {counted(int(most), 'step')} after a graft, and growth.min_optimizer_steps is "
        f"{spec.growth.min_optimizer_steps}, so nothing would ever be grafted: take fewer decisions, a larger budget, "
        "or a lower min_optimizer_steps"
    )


def metrics(point: dict[str, float]) -> dict[str, float]:
    """What MLflow gets at a decision, from a point of the curve: loss, size and every ledger axis at one step."""
    return point if "accuracy" in point else {**point, "perplexity": perplexity(point["val_loss"])}
