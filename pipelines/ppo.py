"""Train a gardener: PPO (Simic) over a fleet of Ray workers, each growing a GPT on text.

    python pipelines/ppo.py                                  # preset by device, as many workers as cores; without a
                                                             # GPU that is `demo`: minutes, and no good policy
    python pipelines/ppo.py --preset tinystories-char        # a laptop for hours
    ray job submit -- python pipelines/ppo.py                # on a cluster
    esper ppo --surrogate --set ppo.iterations=30            # learn on a loss law, in a minute
    esper ppo --resume runs/ppo-20260101-120000              # go on from its last checkpoint

Leaves `summary.json`, `spec.json` and `checkpoints/` in the output folder. A checkpoint holds RLlib's own and
`policy/`, which `esper train ppo --policy` plays without Ray.
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from esper.pipelines.arguments import CommonArguments, main_guard
from esper.pipelines.gardener import ResumePoint, gpus_needed, train_gardener
from esper.pipelines.job import Job, describe, open_job, output_folder, resolve_spec
from esper.platform import cluster
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.spec import saved_spec
from esper.policies.simic.policy import SimicPolicy, checkpoints


class PPOArguments(CommonArguments):
    """Train a gardener with PPO over a fleet of workers."""

    surrogate: Annotated[
        bool, Field(description="Train on a loss law instead of on text: seconds, and no proof of anything on text.")
    ] = False
    resume: Annotated[
        Path | None, Field(title="DIR", description="Go on from the last checkpoint of this output folder.")
    ] = None


def run(arguments: PPOArguments) -> None:
    """Settle, connect, train, report."""
    seed, surrogate, start = arguments.seed, arguments.surrogate, None
    if arguments.resume is not None:
        start = resume_point(arguments.resume)
        seed, surrogate = start.seed, start.surrogate
        if arguments.preset is None:
            arguments = arguments.model_copy(update={"preset": str(arguments.resume / "spec.json")})
    spec = resolve_spec(arguments, fleet=not surrogate)
    if start is not None and start.iterations >= spec.ppo.iterations:
        raise UserError(
            f"--resume {arguments.resume} has its {start.iterations} iterations: ask for more, such as "
            f"--set ppo.iterations={2 * start.iterations}."
        )
    job = Job(spec, Path(), output_folder(arguments, "ppo")) if surrogate else open_job(arguments, spec, "ppo")
    if surrogate:
        say(f"preset  {spec.preset}: {describe(spec)}")
        say(f"out     {job.out}")
    if arguments.resume is not None and not surrogate:
        refuse_other_data(job, arguments.resume)
    with cluster.session(gpus=None if surrogate else gpus_needed(spec)):
        job.begin()
        summary = train_gardener(job, job.out, seed=seed, surrogate=surrogate, start=start)
    say(f"results: {job.out / 'summary.json'}")
    say(f"compare: {summary['where']}")


def resume_point(folder: Path) -> ResumePoint:
    """Where a `ppo` run's newest checkpoint stands, as its card tells.

    Raises:
        UserError: the folder holds none.
    """
    found = checkpoints(folder)
    if not found:
        raise UserError(f"--resume {folder} holds no checkpoint: name the output folder of an `esper ppo` run.")
    return ResumePoint(found[-1], **SimicPolicy.load(found[-1]).card["extra"])


def refuse_other_data(job: Job, resumed: Path) -> None:
    """Go on only with the tokenizer that the checkpoint was trained with.

    Raises:
        UserError: the shards are of another tokenizer.
    """
    before, now = saved_spec(resumed / "spec.json").data.tokenizer, job.spec.data.tokenizer
    if before != now:
        raise UserError(
            f"the checkpoint in {resumed} was trained on tokenizer {before!r}, but the shards in {job.data} are "
            f"{now!r}: leave out data.tokenizer, or start anew without --resume."
        )


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, PPOArguments, "esper ppo", argv)


if __name__ == "__main__":
    sys.exit(main())
