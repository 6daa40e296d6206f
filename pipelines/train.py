"""Train one GPT under one arm.

    python pipelines/train.py tamiyo                                    # preset by device, data from the hub
    esper train heuristic --task tinystories --data stories.txt
    esper train schedule --schedule plan.json --set budget.decisions=12
    esper train ppo --policy runs/ppo-20260101-120000
    esper train --resume runs/train-tamiyo-20260101-120000      # one that was stopped or killed: to the same numbers

Leaves `summary.json` (final loss, every cost axis, grafts, loss curve), `spec.json` and the newest checkpoint in the
output folder, and a run in MLflow. Ctrl-C and SIGTERM save first.
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from esper.pipelines.common.arguments import Positional, ResumableArguments, main_guard
from esper.pipelines.common.play import metrics, play, unplayed
from esper.pipelines.common.progress import RunProgress
from esper.pipelines.common.run_folder import open_job, resolve_spec
from esper.pipelines.common.stopping import Stopped, StopSignals
from esper.platform.checkpoint import CheckpointStore
from esper.platform.console import duration, say
from esper.platform.contracts import GraftAction, GrowthPolicy, Stateful, Transition
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec
from esper.platform.storage import write_json
from esper.platform.telemetry import Telemetry
from esper.platform.tracking import Tracker, new_key
from esper.policies.arms import ALIASES, ARMS, ArmInputs, arm_name, make_policy
from esper.workers.probe import ChargedProbe
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData

CHECKPOINTS, RUN = "checkpoints", "run"  # in a run's output folder, and the name there


class TrainArguments(ResumableArguments):
    """Train one GPT under one arm."""

    arm: Positional[str] = Field(default="static", description=f"One of {', '.join([*ARMS, *ALIASES])}.")
    policy: Annotated[Path | None, Field(description="For ppo: a policy that `esper ppo` trained.")] = None
    schedule: Annotated[Path | None, Field(title="FILE", description="For schedule: a JSON list of grafts.")] = None
    match: Annotated[
        Path | None,
        Field(title="FILE", description="For random: a summary.json, to graft as often and the same kinds."),
    ] = None


class Plan(Frozen):
    """What a run needs beside its spec: kept in its checkpoints, so that `--resume` needs nothing else."""

    arm: str
    seed: int
    task: str
    data: Path
    policy: Path | None
    schedule: Path | None
    match: Path | None
    key: str  # of its MLflow run

    def make_policy(self, spec: RunSpec) -> GrowthPolicy:
        """The arm's controller."""
        blueprints = tuple(spec.growth.blueprints)
        return make_policy(self.arm, ArmInputs(self.seed, self.policy, self.schedule, self.match, blueprints))


def run(arguments: TrainArguments) -> int:
    """Settle, train, report; 1 if the run had to be given up."""
    if arguments.resume is not None:
        return resume(arguments, arguments.resume)
    arm = arm_name(arguments.arm)
    spec = resolve_spec(arguments)
    files = [path and path.absolute() for path in (arguments.policy, arguments.schedule, arguments.match)]
    plan = Plan.checked(
        dict(zip(Plan.model_fields, (arm, arguments.seed, arguments.task, Path(), *files, new_key()), strict=True)),
        "the arguments",
    )
    policy = plan.make_policy(spec)
    job = open_job(arguments, spec, f"train-{arm}")
    job.begin()
    growth = GrowthRun(spec, job.open_data())
    growth.reset(seed=plan.seed)
    return train(growth, policy, plan.model_copy(update={"data": job.data}), job.out)


def resume(arguments: TrainArguments, out: Path) -> int:
    """Go on with the run whose results are in `out`.

    Raises:
        UserError: other arguments are given, the run has ended, or it cannot be restored.
    """
    if (out / "summary.json").exists():
        raise UserError(f"the run in {out} has ended: its results are in {out / 'summary.json'}.")
    out = out.absolute()
    values, tensors = CheckpointStore(out / CHECKPOINTS).load(RUN)
    kept = values["train"]
    plan = Plan.checked(kept["plan"], f"the checkpoint in {out}")
    spec = RunSpec.checked(values["books"]["spec"], f"the checkpoint in {out}")
    policy = plan.make_policy(spec)
    if isinstance(policy, Stateful):
        policy.resume(kept["policy"])
    growth = GrowthRun(spec, TokenData.open(plan.data))
    growth.load(values, tensors)
    say(f"resume  {out}, {plan.arm}, at optimizer step {growth.ledger.steps:,} ({growth.fraction():.0%} of the budget)")
    return train(growth, policy, plan, out)


def train(growth: GrowthRun, policy: GrowthPolicy, plan: Plan, out: Path) -> int:
    """Play the run from where it stands to its end, saving at every decision, and report."""
    spec, arm = growth.spec, plan.arm
    progress = RunProgress(growth.fraction())
    tags = {"arm": arm, "seed": plan.seed, "preset": spec.preset}
    params = spec.model_dump(mode="json")
    with (
        StopSignals() as signals,
        CheckpointStore(out / CHECKPOINTS) as checkpoints,
        Tracker.start(f"esper-{plan.task}", out.name, tags=tags, params=params, key=plan.key) as tracker,
    ):

        def save() -> None:
            values, tensors = growth.state()
            values["train"] = {
                "plan": plan.model_dump(mode="json"),
                "policy": policy.state() if isinstance(policy, Stateful) else None,
            }
            checkpoints.save(RUN, values, tensors)

        def on_step(growth: GrowthRun) -> None:
            progress.on_step(growth)
            signals.check()

        def on_decision(growth: GrowthRun, telemetry: Telemetry, action: GraftAction, transition: Transition) -> None:
            progress.on_decision(growth, telemetry, action, transition)
            tracker.log(metrics(growth.curve[-1]), growth.ledger.steps)
            save()

        growth.on_step = on_step
        save()
        try:
            summary = play(growth, policy, arm=arm, probe=ChargedProbe(growth), on_decision=on_decision)
        except Stopped as stopped:
            save()
            checkpoints.close()
            where = f"saved at optimizer step {growth.ledger.steps:,}; go on with: esper train --resume {out}"
            raise Stopped(stopped.number, checkpoints.failed or where) from None
        checkpoints.flush()
        summary["mlflow"] = tracker.run_id
        write_json(out / "summary.json", summary)
        tracker.artifact(out / "summary.json")
        tracker.artifact(out / "spec.json")
    if summary["failure"]:
        say(f"given up at {growth.fraction():.0%} of the budget: {summary['failure']}; lower the learning rate.")
        say(f"the last sound state is in {out / CHECKPOINTS}")
    say(
        f"{arm}: val loss {summary['val_loss']:.4f} nats per token (perplexity {summary['perplexity']:.2f}), "
        f"{summary['parameters']:,} parameters, {len(summary['grafts'])} grafts, {summary['steps']:,} steps, "
        f"{summary['parameter_seconds']:,.0f} parameter-seconds, {duration(summary['wall_seconds'])} of training"
    )
    if told := unplayed(summary):
        say(told)
    for point in summary["annealed"]:
        loss = "not finite" if point["val_loss"] is None else f"{point['val_loss']:.4f}"
        say(f"annealed at {point['budget_fraction']:.0%} of the budget: val loss {loss}")
    say(f"results: {out / 'summary.json'}")
    say(f"compare: {tracker.where}")
    return 1 if summary["failure"] else 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, TrainArguments, "esper train", argv)


if __name__ == "__main__":
    sys.exit(main())
