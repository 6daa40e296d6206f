"""Look at a trained controller, hold it against the other arms, or boil it down to a schedule. Without Ray.

    python pipelines/policy.py info runs/ppo-20260101-120000                            # what it is
    esper policy evaluate runs/ppo-20260101-120000                                      # on loss laws it never saw
    esper policy evaluate runs/ppo-20260101-120000 --data stories.txt --episodes 4      # a GPT per arm and instance
    esper policy distill runs/ppo-20260101-120000 --out plan.json                       # its median schedule …
    esper train schedule --schedule plan.json                                           # … as an arm of its own

A checkpoint is the folder of a `ppo` run (its newest is taken), one in its `checkpoints/`, or the `policy/` in one.
`evaluate` leaves `evaluation.json`, with a number per instance and arm, and `spec.json` in its output folder.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from esper.pipelines.common.arguments import Arguments, CommonArguments, Positional, choose, main_guard
from esper.pipelines.common.run_folder import describe, law_job, open_job, resolve_spec
from esper.pipelines.common.statistics import Interval
from esper.pipelines.controllers.comparison import Comparison
from esper.pipelines.controllers.contest import ARMS, TRAINED, Contest, median_entries, parse_arms
from esper.pipelines.controllers.evaluation import Stage
from esper.platform.console import say
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec
from esper.platform.storage import check_new_file, read_json, write_json
from esper.policies.arms import ArmInputs, make_policy
from esper.policies.schedule import Entry, SchedulePolicy
from esper.policies.simic.policy import CHECKPOINTS, FOLDER, SimicPolicy, policy_folder
from esper.workers.instances import SetName, instance_set
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.run import GrowthRun

ON_TEXT = 4  # instances that are played where the user does not say how many

Checkpoint = Positional[Path]
CHECKPOINT = "A trained policy: the folder of an `esper ppo` run, or a checkpoint in it."
PRESET = Annotated[
    str | None,
    Field(title="NAME|FILE", description="A preset's name or a JSON file (default: what it was trained on)."),
]
EPISODES = Annotated[int | None, Field(ge=1, description="Play only the first N instances of the set.")]


class InfoArguments(Arguments):
    """Say what a trained policy is."""

    checkpoint: Checkpoint = Field(description=CHECKPOINT)


class EvaluateArguments(CommonArguments):
    """Play a trained policy and other arms on an instance set, on loss laws or (with --data) on text."""

    checkpoint: Checkpoint = Field(description=CHECKPOINT)
    preset: PRESET = None
    instances: Annotated[SetName, Field(description="The instance set: train, or test.")] = "test"
    episodes: EPISODES = None
    arms: Annotated[
        str | None, Field(title="A,B,C", description=f"Of {', '.join(ARMS)} (default: all that can be had).")
    ] = None
    schedule: Annotated[
        Path | None,
        Field(
            title="FILE", description="For schedule: a JSON list of grafts, instead of the best on training instances."
        ),
    ] = None


class DistillArguments(Arguments):
    """Write a trained policy's median schedule over an instance set of loss laws."""

    checkpoint: Checkpoint = Field(description=CHECKPOINT)
    out: Annotated[Path, Field(title="FILE", description="A new file for the schedule; must be given.")]
    preset: PRESET = None
    instances: Annotated[SetName, Field(description="The instance set: train, or test.")] = "train"
    episodes: EPISODES = None
    seed: Annotated[int, Field(ge=0, description="Seed of every random stream; 0 or more.")] = 0
    set: Annotated[
        list[str],
        Field(title="KEY.PATH=VALUE", description="Change one value of the preset; may be given again for others."),
    ] = []  # noqa: RUF012  (pydantic copies it)


# -- info ------------------------------------------------------------------------------------------------------------


def info(arguments: InfoArguments) -> None:
    """Print what the checkpoint says of itself."""
    folder = policy_folder(arguments.checkpoint)
    policy = SimicPolicy.load(folder)
    for name, value in described(policy, folder).items():
        print(f"{name:<12} {value}")


def described(policy: SimicPolicy, folder: Path) -> dict[str, str]:
    """What a policy is, as names and texts; only what is known."""
    card, own = policy.card, spec_beside(folder)
    extra = {key: value for key, value in card["extra"].items() if value is not None}
    preset = extra.get("preset") or (own and read_json(own, str(own), "the spec.json of a run").get("preset"))
    surrogate = {True: "loss laws (surrogate)", False: "text"}.get(extra.get("surrogate", ""))
    counts = {name: f"{extra[name]:,.0f}" for name in ("iterations", "episodes", "decisions") if name in extra}
    known = {
        "format": f"{card['format']}, telemetry version {card['telemetry_version']}",
        "hidden width": str(card["hidden"]),
        "parameters": f"{sum(p.numel() for p in policy.net.parameters()):,}",
        "trained on": surrogate,
        "preset": preset,
        **counts,
        "seed": str(extra["seed"]) if "seed" in extra else None,
        "weights": f"sha256 {card['sha256']}",
        "folder": str(folder.absolute()),
    }
    return {name: value for name, value in known.items() if value is not None}


def spec_beside(folder: Path) -> Path | None:
    """The `spec.json` of the `ppo` run that a policy's folder lies in; None where it lies elsewhere."""
    checkpoint = folder.absolute().parent
    inside = folder.absolute().name == FOLDER and checkpoint.parent.name == CHECKPOINTS
    path = checkpoint.parents[1] / "spec.json" if inside else None
    return path if path is not None and path.is_file() else None


# -- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(arguments: EvaluateArguments) -> None:
    """Settle, play, compare, report."""
    folder = policy_folder(arguments.checkpoint)
    policy = SimicPolicy.load(folder)
    on_text = arguments.data is not None
    spec = spec_for(arguments, folder, on_text=on_text)
    schedules = {}
    if arguments.schedule is not None:
        inputs = ArmInputs(schedule=arguments.schedule, blueprints=tuple(spec.growth.blueprints))
        schedules["schedule"] = schedule_of(inputs)
    arms = parse_arms(arguments.arms, on_text=on_text, schedules=schedules)
    episodes = ON_TEXT if on_text and arguments.episodes is None else arguments.episodes
    chosen = instances(spec, arguments.instances, episodes)
    job = open_job(arguments, spec, "evaluate") if on_text else law_job(arguments, spec, "evaluate")
    make_run = partial(GrowthRun, spec, job.open_data()) if on_text else partial(SurrogateRun, spec)
    stage = Stage(spec, chosen, make_run, arguments.seed)
    training = None if on_text else replace(stage, instances=instance_set("train", spec))
    contest = Contest(stage, policy, training, schedules)
    job.begin()
    where = "text" if on_text else "loss laws"
    say(f"policy  {folder}, on {len(stage.instances)} {arguments.instances} instances, {where}")
    comparison = contest.compare(arms)
    write_json(job.out / "evaluation.json", record(arguments, folder, contest, comparison))
    print(comparison.table())
    say("means over the instances, in nats per token; ± is half of a 95 % interval (paired t)")
    say(f"results: {job.out / 'evaluation.json'}")


def record(arguments: EvaluateArguments, folder: Path, contest: Contest, comparison: Comparison) -> dict[str, Any]:
    """`evaluation.json`: the table's rows, and what every arm reached on every instance."""
    stage = contest.stage
    return {
        "policy": {"folder": str(folder.absolute()), **contest.policy.card},
        "on": "text" if contest.training is None else "loss laws",
        "preset": stage.spec.preset,
        "set": arguments.instances,
        "seed": arguments.seed,
        "reference": comparison.reference,
        "rows": [row.as_dict() for row in comparison.rows()],
        "schedules": {arm: as_json(entries) for arm, entries in contest.schedules.items()},
        "instances": {
            id: {"instance": stage.instances[id].model_dump(mode="json"), "seed": stage.seed_of(id), **reached}
            for id, reached in comparison.instances().items()
        },
    }


# -- distill ---------------------------------------------------------------------------------------------------------


def distill(arguments: DistillArguments) -> None:
    """Play the policy, take its median schedule, play that, report."""
    check_new_file(arguments.out)
    out = arguments.out.absolute()
    folder = policy_folder(arguments.checkpoint)
    policy = SimicPolicy.load(folder)
    common = CommonArguments(preset=arguments.preset, set=arguments.set)
    spec = spec_for(common, folder, on_text=False)
    chosen = instances(spec, arguments.instances, arguments.episodes)
    stage = Stage(spec, chosen, partial(SurrogateRun, spec), arguments.seed)
    say(f"preset  {spec.preset}: {describe(spec)}")
    say(f"policy  {folder}, on {len(chosen)} {arguments.instances} instances, loss laws")
    by_policy = stage.play(TRAINED, lambda seed: policy)
    entries = median_entries(by_policy, stage)
    write_json(out, as_json(entries))
    by_schedule = stage.play("openloop", lambda seed: SchedulePolicy(entries))
    for entry in entries:
        print(f"{entry.at:6.1%}  {entry.blueprint}" + (f" at {entry.site}" if entry.site else ""))
    grafts, prunes = by_policy.grafts(), sum(len(summary["prunes"]) for summary in by_policy.summaries.values())
    many = f"{min(grafts)} to {max(grafts)}, {np.mean(grafts):.1f} on average"
    say(f"grafts  {len(entries)} in the schedule; the policy's episodes have {many}")
    if prunes:
        say(f"        and {prunes} prunes in all, which a schedule cannot hold")
    losses, blind = by_policy.losses(), by_schedule.losses()
    say(f"loss    {losses.mean():.4f} by the policy, {blind.mean():.4f} by the schedule: not looking at the run costs")
    say(f"        {Interval.of(blind - losses)} nats (95 % interval, paired t)")
    say(f"wrote   {out}; play it with: esper train schedule --schedule {out}")


# -- Shared ----------------------------------------------------------------------------------------------------------


def spec_for(arguments: CommonArguments, folder: Path, *, on_text: bool) -> RunSpec:
    """What is played: the preset that is named, else the policy's own, with overrides.

    Raises:
        UserError: no such preset, or a value that is not allowed.
    """
    own = spec_beside(folder)
    if arguments.preset is None and own is not None:
        arguments = arguments.model_copy(update={"preset": str(own)})
    spec = resolve_spec(arguments, on="here" if on_text else "laws")
    torch.set_num_threads(spec.threads)
    return spec


def instances(spec: RunSpec, name: SetName, first: int | None) -> dict[int, Instance]:
    """An instance set, or its first instances.

    Raises:
        UserError: it has not so many.
    """
    whole = instance_set(name, spec)
    if first is not None and first > len(whole):
        raise UserError(f"--episodes is {first}, but the {name} set has {len(whole)} instances: ask for fewer.")
    return dict(islice(whole.items(), first))


def schedule_of(inputs: ArmInputs) -> list[Entry]:
    """The entries of a schedule's file, checked."""
    policy = make_policy("schedule", inputs)
    assert isinstance(policy, SchedulePolicy)
    return policy.entries


def as_json(entries: list[Entry]) -> list[dict[str, Any]]:
    """A schedule as `policies/schedule.py` reads it."""
    return [entry.model_dump(mode="json", exclude_none=True) for entry in entries]


# -- Command ---------------------------------------------------------------------------------------------------------

ACTIONS: dict[str, tuple[Callable[..., None], type[Arguments], str]] = {
    "info": (info, InfoArguments, "say what a trained policy is"),
    "evaluate": (evaluate, EvaluateArguments, "play it and the other arms on an instance set"),
    "distill": (distill, DistillArguments, "write its median schedule as JSON"),
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    actions = {
        name: (summary, partial(main_guard, work, model, f"esper policy {name}"))
        for name, (work, model, summary) in ACTIONS.items()
    }
    return choose("esper policy", "action", actions, argv)


if __name__ == "__main__":
    sys.exit(main())
