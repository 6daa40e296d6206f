"""One episode under one policy: the loop that every arm goes through."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from esper.platform.checkpoint import CheckpointStore, Content
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


def metrics(point: dict[str, float]) -> dict[str, float]:
    """What MLflow gets at a decision, from a point of the curve: loss, size and every ledger axis at one step."""
    return point if "accuracy" in point else {**point, "perplexity": perplexity(point["val_loss"])}
