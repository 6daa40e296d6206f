"""Compare arms at an equal budget: Ray Tune over arms × seeds, MLflow for the curves.

    python pipelines/sweep.py --arms static,tamiyo --seeds 3
    esper sweep --arms static,tamiyo,ppo --policy runs/ppo-20260101-120000
    esper sweep --arms static,ppo                   # no policy given: trains one first, on the same spec; without a
                                                    # GPU the preset is then `demo`

Leaves `summary.json` (a list of run summaries), `loss.png` and a folder per trial; in MLflow a parent run with a child
per trial.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from esper.pipelines.arguments import CommonArguments, main_guard
from esper.pipelines.gardener import gpus_needed, train_gardener
from esper.pipelines.job import Job, open_job, resolve_spec
from esper.pipelines.picture import draw_losses
from esper.pipelines.table import arm_table
from esper.pipelines.trials import run_trials
from esper.platform import cluster
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec
from esper.platform.storage import write_json
from esper.platform.tracking import Tracker
from esper.policies.arms import ALIASES, ARMS, ArmInputs, arm_name, make_policy

TRAINING_SEED = 1_000_000  # gardeners are trained on seeds that no arm is compared on


class SweepArguments(CommonArguments):
    """Compare arms at an equal budget."""

    arms: Annotated[
        str, Field(title="A,B,C", description=f"Arms, separated by commas, of {', '.join([*ARMS, *ALIASES])}.")
    ] = "static,tamiyo"
    seeds: Annotated[int, Field(ge=1, le=1000, description="Seeds of each arm: --seed and those after it.")] = 1
    policy: Annotated[Path | None, Field(description="For ppo: a trained policy; without one it is trained first.")] = (
        None
    )
    schedule: Annotated[Path | None, Field(title="FILE", description="For schedule: a JSON list of grafts.")] = None


def run(arguments: SweepArguments) -> int:
    """Settle, run the trials, report; 1 if a trial failed."""
    spec = resolve_spec(arguments, on="fleet" if "ppo" in arguments.arms and arguments.policy is None else "here")
    arms, inputs = parse_arms(arguments, spec)
    job = open_job(arguments, spec, "sweep")
    with cluster.session(gpus=gpus_needed(spec)):
        job.begin()
        return compare(job, arms, arguments, inputs)


def parse_arms(arguments: SweepArguments, spec: RunSpec) -> tuple[list[str], ArmInputs]:
    """The arms by name, and what they are given; what is missing is refused before anything starts.

    Raises:
        UserError: no arm, an unknown one, or one that lacks what it needs.
    """
    arms = list(dict.fromkeys(arm_name(name.strip()) for name in arguments.arms.split(",") if name.strip()))
    if not arms:
        raise UserError(f"--arms names no arm: give one or more of {', '.join([*ARMS, *ALIASES])}.")
    inputs = ArmInputs(arguments.seed, arguments.policy, arguments.schedule, blueprints=tuple(spec.growth.blueprints))
    for arm in arms:
        if arm != "ppo" or arguments.policy is not None:
            make_policy(arm, inputs)
    return arms, inputs


def compare(job: Job, arms: list[str], arguments: SweepArguments, inputs: ArmInputs) -> int:
    """Run every arm on every seed on the connected cluster; 1 if a trial failed."""
    experiment = f"esper-{arguments.task}"
    parent = Tracker.start(
        experiment,
        job.out.name,
        tags={"kind": "sweep", "preset": job.spec.preset},
        params=job.spec.model_dump(mode="json"),
    )
    with parent:
        policy = inputs.policy
        if "ppo" in arms and policy is None:
            say("sweep   no --policy given: training a gardener first")
            trained = train_gardener(job, job.out / "ppo", seed=TRAINING_SEED + arguments.seed, parent=parent.run_id)
            policy = Path(trained["checkpoint"])
        seeds = list(range(arguments.seed, arguments.seed + arguments.seeds))
        say(f"sweep   {len(arms) * len(seeds)} trials: {', '.join(arms)}, {len(seeds)} seed(s) each")
        summaries, failures = run_trials(
            job, arms, seeds, replace(inputs, policy=policy), experiment=experiment, parent=parent.run_id
        )
        write_json(job.out / "summary.json", summaries)
        if summaries:
            draw_losses(summaries, job.out / "loss.png")
            parent.artifact(job.out / "loss.png")
            say(arm_table(summaries))
        parent.artifact(job.out / "summary.json")
        for failure in failures:
            say(f"failed  {failure}")
        say(f"results: {job.out / 'summary.json'}, picture {job.out / 'loss.png'}")
        say(f"compare: {parent.where}")
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, SweepArguments, "esper sweep", argv)


if __name__ == "__main__":
    sys.exit(main())
