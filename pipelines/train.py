"""Train one GPT under one arm.

    python pipelines/train.py tamiyo                                    # preset by device, data from the hub
    esper train heuristic --task tinystories --data stories.txt
    esper train schedule --schedule plan.json --set budget.decisions=12
    esper train ppo --policy runs/ppo-20260101-120000

Leaves `summary.json` (final loss, every cost axis, grafts, loss curve) and `spec.json` in the output folder, and a
run in MLflow.
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import CliPositionalArg

from esper.pipelines.arguments import CommonArguments, main_guard
from esper.pipelines.job import open_job, resolve_spec
from esper.pipelines.play import metrics, play
from esper.pipelines.progress import RunProgress
from esper.platform.console import duration, say
from esper.platform.contracts import GraftAction, Transition
from esper.platform.storage import write_json
from esper.platform.telemetry import Telemetry
from esper.platform.tracking import Tracker
from esper.policies.arms import ALIASES, ARMS, ArmInputs, arm_name, make_policy
from esper.workers.run import GrowthRun


class TrainArguments(CommonArguments):
    """Train one GPT under one arm."""

    arm: CliPositionalArg[str] = Field("static", description=f"One of {', '.join([*ARMS, *ALIASES])}.")
    policy: Annotated[Path | None, Field(description="For ppo: a policy that `esper ppo` trained.")] = None
    schedule: Annotated[Path | None, Field(title="FILE", description="For schedule: a JSON list of grafts.")] = None
    match: Annotated[
        Path | None,
        Field(title="FILE", description="For random: a summary.json, to graft as often and the same kinds."),
    ] = None


def run(arguments: TrainArguments) -> None:
    """Settle, train, report."""
    arm = arm_name(arguments.arm)
    spec = resolve_spec(arguments)
    inputs = ArmInputs(
        arguments.seed, arguments.policy, arguments.schedule, arguments.match, tuple(spec.growth.blueprints)
    )
    policy = make_policy(arm, inputs)
    job = open_job(arguments, spec, f"train-{arm}")
    job.begin()
    progress = RunProgress()
    growth = GrowthRun(spec, job.open_data(), on_step=progress.on_step)
    tags = {"arm": arm, "seed": arguments.seed, "preset": spec.preset}
    with Tracker.start(
        f"esper-{arguments.task}", job.out.name, tags=tags, params=spec.model_dump(mode="json")
    ) as tracker:

        def on_decision(growth: GrowthRun, telemetry: Telemetry, action: GraftAction, transition: Transition) -> None:
            progress.on_decision(growth, telemetry, action, transition)
            tracker.log(metrics(growth.curve[-1]), growth.ledger.steps)

        summary = play(growth, policy, arm=arm, seed=arguments.seed, on_decision=on_decision)
        summary["mlflow"] = tracker.run_id
        write_json(job.out / "summary.json", summary)
        tracker.artifact(job.out / "summary.json")
        tracker.artifact(job.out / "spec.json")
    if summary["diverged"]:
        say(f"diverged: the loss was not finite at {growth.fraction():.0%} of the budget; lower the learning rate.")
    say(
        f"{arm}: val loss {summary['val_loss']:.4f} nats per token (perplexity {summary['perplexity']:.2f}), "
        f"{summary['parameters']:,} parameters, {len(summary['grafts'])} grafts, {summary['steps']:,} steps, "
        f"{summary['parameter_seconds']:,.0f} parameter-seconds, {duration(summary['wall_seconds'])} of training"
    )
    say(f"results: {job.out / 'summary.json'}")
    say(f"compare: {tracker.where}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, TrainArguments, "esper train", argv)


if __name__ == "__main__":
    sys.exit(main())
