"""One episode under one policy: the loop that every arm goes through."""

from collections.abc import Callable
from typing import Any, TypeVar

from esper.platform.contracts import GraftAction, GrowthPolicy, Instance, Run, Transition
from esper.platform.telemetry import Telemetry
from esper.workers.episode import perplexity

R = TypeVar("R", bound=Run)
OnDecision = Callable[[R, Telemetry, GraftAction, Transition], None]


def play(
    run: R,
    policy: GrowthPolicy,
    *,
    arm: str,
    seed: int,
    instance: Instance | None = None,
    on_decision: OnDecision[R] | None = None,
) -> dict[str, Any]:
    """Play the episode to its end and return its summary."""
    telemetry = run.reset(instance, seed)
    while True:
        action = policy.act(telemetry)
        transition = run.step(action)
        if on_decision is not None:
            on_decision(run, telemetry, action, transition)
        if transition.terminated or transition.truncated:
            return {"arm": arm, **run.summary()}
        telemetry = transition.telemetry


def metrics(point: dict[str, float]) -> dict[str, float]:
    """What MLflow gets at a decision, from a point of the curve: loss, size and every ledger axis at one step."""
    return {**point, "perplexity": perplexity(point["val_loss"])}
