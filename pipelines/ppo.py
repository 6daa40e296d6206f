"""Train a controller: PPO (Simic) over a fleet of Ray workers, each growing a GPT on text.

    python pipelines/ppo.py                                  # preset by device, as many workers as cores; without a
                                                             # GPU that is `demo`: minutes, and no good policy
    python pipelines/ppo.py --preset tinystories-char        # a laptop for hours
    ray job submit -- python pipelines/ppo.py                # on a cluster
    esper ppo --surrogate                                    # learn on loss laws, in minutes
    esper ppo --resume runs/ppo-20260101-120000              # go on where it was stopped or killed

Leaves `summary.json`, `spec.json`, `history.jsonl`, `training.png` and `checkpoints/` in the output folder. A
checkpoint holds RLlib's own and `policy/`, which `esper train ppo --policy` plays without Ray. `episodes/` and `saves/`
hold the episodes under way, so that a resumed training goes on with them. Ctrl-C and SIGTERM stop it where it can be
resumed.
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from esper.pipelines.common.arguments import ResumableArguments, main_guard
from esper.pipelines.common.run_folder import Job, law_job, open_job, resolve_spec
from esper.pipelines.common.stopping import Stopped, StopSignals
from esper.pipelines.controllers.training import ON_LAWS, ResumePoint, gpus_needed, send_again, train_controller
from esper.platform import cluster
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.platform.storage import alone
from esper.platform.tracking import synced
from esper.platform.tracking_store import tracking_uri

OTHERS = ("ppo", "fleet")  # groups of the spec that a resumed training may change


class PPOArguments(ResumableArguments):
    """Train a controller with PPO over a fleet of workers."""

    beside_resume = ("set",)

    surrogate: Annotated[
        bool, Field(description="Train on loss laws instead of on text: minutes, and no proof of anything on text.")
    ] = False
    resume: Annotated[
        Path | None,
        Field(title="DIR", description="Go on with the training in this folder; takes --set ppo.… and fleet.… only."),
    ] = None


def run(arguments: PPOArguments) -> None:
    """Settle, connect, train, report."""
    if arguments.resume is not None:
        return resume(arguments, arguments.resume)
    if arguments.surrogate:
        of_laws = [f"{key}={value}" for key, value in ON_LAWS.items()]
        arguments = arguments.model_copy(update={"set": [*of_laws, *arguments.set]})
    spec = resolve_spec(arguments, on="laws" if arguments.surrogate else "fleet")
    job = law_job(arguments, spec, "ppo") if arguments.surrogate else open_job(arguments, spec, "ppo")
    return train(job, seed=arguments.seed, surrogate=arguments.surrogate)


def resume(arguments: PPOArguments, out: Path) -> None:
    """Go on with the training in `out`, or give MLflow what it has not had of one that has ended.

    Raises:
        UserError: other arguments are given, there is nothing to go on with, or nothing left to do.
    """
    for override in arguments.set:
        if override.split(".")[0] not in OTHERS or override.startswith("ppo.hidden"):
            raise UserError(
                f"--set {override} would make another training of the one in {out}: with --resume only keys of "
                f"{' and '.join(OTHERS)} may change, such as ppo.iterations, and ppo.hidden, the network's own, not."
            )
    start = ResumePoint.newest(out)
    point = start[1]
    spec = load_spec(str(out / "spec.json"), arguments.set)
    if point.iterations >= spec.ppo.iterations and (out / "summary.json").exists():
        if not arguments.set and not synced(out, tracking_uri()):
            return send(out)
        raise UserError(
            f"--resume {out} has its {point.iterations} iterations: ask for more, such as "
            f"--set ppo.iterations={2 * point.iterations}."
        )
    job = Job(spec, point.data or Path(), out.absolute())
    if not point.surrogate and job.open_data().manifest.fingerprint() != point.fingerprint:
        raise UserError(
            f"the training in {out} was begun on other text or another tokenizer than {job.data} holds now: "
            "prepare that as it was."
        )
    say(f"resume  {out}: {point.iterations} iterations, {point.episodes:.0f} episodes, {point.decisions:.0f} decisions")
    return train(job, seed=point.seed, surrogate=point.surrogate, start=start)


def send(out: Path) -> None:
    """Give MLflow what it has not had of a training that has ended.

    Raises:
        UserError: it does not take it.
    """
    with alone(out):
        if not send_again(out):
            raise UserError(f"MLflow did not take everything of the training in {out}: try again once it is there.")
    say(f"MLflow has had everything of the training in {out} now.")


def train(job: Job, *, seed: int, surrogate: bool, start: tuple[Path, ResumePoint] | None = None) -> None:
    """Connect, train, and say where everything is."""
    # The signals last: `ray.init` puts in a handler of its own, in C, that aborts.
    gpus = None if surrogate else gpus_needed(job.spec)
    with alone(job.out), cluster.session(gpus=gpus), StopSignals() as signals:
        if start is None:
            job.begin()
        try:
            summary = train_controller(job, job.out, seed=seed, surrogate=surrogate, start=start, check=signals.check)
        except Stopped as stopped:
            how = f"stopped, with nothing lost; go on with: esper ppo --resume {job.out}"
            raise Stopped(stopped.number, str(stopped) or how) from None
    say(f"results: {job.out / 'summary.json'}; curves: {job.out / 'training.png'}")
    say(f"compare: {summary['where']}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, PPOArguments, "esper ppo", argv)


if __name__ == "__main__":
    sys.exit(main())
