"""Look at a trained controller, hold it against the other arms, or boil it down to a schedule. Without Ray.

    python pipelines/policy.py info runs/ppo-20260101-120000                            # what it is
    esper policy evaluate runs/ppo-20260101-120000                                      # on loss laws it never saw
    esper policy evaluate runs/ppo-20260101-120000 --data stories.txt --episodes 4      # a GPT per arm and instance
    esper policy distill runs/ppo-20260101-120000 --out plan.json                       # its median schedule …
    esper train schedule --schedule plan.json                                           # … as an arm of its own

A checkpoint is the folder of a `ppo` run (its newest is taken), one in its `checkpoints/`, or the `policy/` in one.
`evaluate` leaves `evaluation.json`, with a number per instance and arm, and `spec.json` in its output folder.
"""

import hashlib
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field

from esper.pipelines.common.arguments import Arguments, CommonArguments, Positional, choose, main_guard
from esper.platform.console import say
from esper.platform.errors import UserError, unknown
from esper.platform.storage import check_new_file, read_json, write_json
from esper.policies.arms import ALIASES

if TYPE_CHECKING:  # they import torch
    from esper.platform.contracts import Instance
    from esper.platform.spec import RunSpec
    from esper.policies.schedule import Entry

ON_TEXT = 4  # instances that are played where the user does not say how many
TRAINED = "ppo"  # the policy itself, which always plays
ANYWHERE = ("static", "random", "tamiyo", "lag")
ARMS = (*ANYWHERE, "schedule", "openloop", "bound")
"""The last three need loss laws: best fixed schedule and the policy's median one, on training instances; the oracle."""

SETS = Literal["train", "test"]


class InfoArguments(Arguments):
    """Say what a trained policy is."""

    checkpoint: Positional[Path] = Field(description="A trained policy: an `esper ppo` run, or a checkpoint in it.")


class PlayArguments(InfoArguments):
    """What is played."""

    preset: Annotated[
        str | None,
        Field(title="NAME|FILE", description="A preset's name or a JSON file (default: what it was trained on)."),
    ] = None
    instances: Annotated[SETS, Field(description="The instance set: train, or test.")] = "test"
    episodes: Annotated[int | None, Field(ge=1, description="Play only the first N instances of the set.")] = None


class EvaluateArguments(PlayArguments, CommonArguments):
    """Play a trained policy and other arms on an instance set, on loss laws or (with --data) on text."""

    arms: Annotated[
        str | None, Field(title="A,B,C", description=f"Of {', '.join(ARMS)} (default: all that can be had).")
    ] = None
    schedule: Annotated[
        Path | None,
        Field(
            title="FILE", description="For schedule: a JSON list of grafts, instead of the best on training instances."
        ),
    ] = None


class DistillArguments(PlayArguments):
    """Write a trained policy's median schedule over an instance set of loss laws."""

    out: Annotated[Path, Field(title="FILE", description="A new file for the schedule; must be given.")]
    instances: Annotated[SETS, Field(description="The instance set: train, or test.")] = "train"
    seed: Annotated[int, Field(ge=0, description="Seed of every random stream; 0 or more.")] = 0
    set: Annotated[
        list[str],
        Field(title="KEY.PATH=VALUE", description="Change one value of the preset; may be given again for others."),
    ] = []  # noqa: RUF012  (pydantic copies it)


def info(arguments: InfoArguments) -> None:
    """Print what the checkpoint says of itself."""
    from esper.policies.simic.policy import SimicPolicy, policy_file

    folder = policy_file(arguments.checkpoint)
    policy = SimicPolicy.load(folder)
    card, own = policy.card, spec_beside(folder)
    extra = {key: value for key, value in card["extra"].items() if value is not None}
    counts = {name: f"{extra[name]:,.0f}" for name in ("iterations", "episodes", "decisions") if name in extra}
    known = {
        "format": f"{card['format']}, telemetry version {card['telemetry_version']}",
        "hidden width": card["hidden"],
        "parameters": f"{sum(p.numel() for p in policy.net.parameters()):,}",
        "trained on": {True: "loss laws (surrogate)", False: "text"}.get(extra.get("surrogate", "")),
        "preset": extra.get("preset") or (own and read_json(own, str(own), "the spec.json of a run").get("preset")),
        **counts,
        "seed": extra.get("seed"),
        "weights": f"sha256 {hashlib.sha256(folder.read_bytes()).hexdigest()}",
        "folder": folder.absolute(),
    }
    for name, value in known.items():
        if value is not None:
            print(f"{name:<12} {value}")


def evaluate(arguments: EvaluateArguments) -> None:
    """Settle, play, compare, report."""
    from esper.pipelines.common.run_folder import RunFolder
    from esper.pipelines.controllers.evaluation import Evaluation, compare
    from esper.policies.arms import ArmInputs, make_policy
    from esper.policies.schedule import SchedulePolicy
    from esper.policies.simic.policy import SimicPolicy, policy_file
    from esper.workers.instances import instance_set
    from esper.workers.laws.surrogate import SurrogateRun
    from esper.workers.run import GrowthRun

    folder = policy_file(arguments.checkpoint)
    policy = SimicPolicy.load(folder)
    on_text = arguments.data is not None
    spec = spec_for(arguments, folder, on_text=on_text)
    given = {}
    if arguments.schedule is not None:
        named = ArmInputs(schedule=arguments.schedule, blueprints=tuple(spec.growth.blueprints))
        given["schedule"] = cast(SchedulePolicy, make_policy("schedule", named)).entries
    arms = parse_arms(arguments.arms, on_text=on_text, given=given)
    chosen = instances(spec, arguments.instances, arguments.episodes or (ON_TEXT if on_text else None))
    place = RunFolder.new(arguments, spec, "evaluate", laws=not on_text)
    make_run = partial(GrowthRun, spec, place.tokens) if on_text else partial(SurrogateRun, spec)
    here = Evaluation(spec, chosen, make_run, arguments.seed)
    training = None if on_text else replace(here, instances=instance_set("train", spec))
    write_json(place.out / "spec.json", spec.model_dump(mode="json"))
    where = "text" if on_text else "loss laws"
    say(f"policy  {folder}, on {len(chosen)} {arguments.instances} instances, {where}")
    found = compare(arms, policy, here, training, given)
    record = {
        "policy": {"folder": str(folder.absolute()), **policy.card},
        "on": where,
        "preset": spec.preset,
        "set": arguments.instances,
        "seed": arguments.seed,
        "reference": found.reference,
        "rows": [row | {"difference": row["difference"] and row["difference"].as_dict()} for row in found.rows()],
        "schedules": {arm: as_json(entries) for arm, entries in found.schedules.items()},
        "instances": {
            id: {"instance": instance.model_dump(mode="json"), "seed": here.seed_of(id), **found.reached(i)}
            for i, (id, instance) in enumerate(chosen.items())
        },
    }
    write_json(place.out / "evaluation.json", record)
    print(found.table())
    say("means over the instances, in nats per token; ± is half of a 95 % interval (paired t)")
    say(f"results: {place.out / 'evaluation.json'}")


def distill(arguments: DistillArguments) -> None:
    """Play the policy, take its median schedule, play that, report."""
    import numpy as np

    from esper.pipelines.common.preset import describe
    from esper.pipelines.common.statistics import Interval
    from esper.pipelines.controllers.evaluation import Evaluation
    from esper.policies.schedule import SchedulePolicy
    from esper.policies.simic.policy import SimicPolicy, policy_file
    from esper.workers.laws.surrogate import SurrogateRun

    check_new_file(arguments.out)
    out = arguments.out.absolute()
    folder = policy_file(arguments.checkpoint)
    policy = SimicPolicy.load(folder)
    spec = spec_for(CommonArguments(preset=arguments.preset, set=arguments.set), folder, on_text=False)
    chosen = instances(spec, arguments.instances, arguments.episodes)
    say(f"preset  {spec.preset}: {describe(spec)}")
    say(f"policy  {folder}, on {len(chosen)} {arguments.instances} instances, loss laws")
    here = Evaluation(spec, chosen, partial(SurrogateRun, spec), arguments.seed)
    entries, by_policy = here.median_schedule(policy)
    write_json(out, as_json(entries))
    by_schedule = here.play("openloop", lambda seed: SchedulePolicy(entries))
    for entry in entries:
        print(f"{entry.at:6.1%}  {entry.blueprint}" + (f" at {entry.site}" if entry.site else ""))
    grafts, prunes = [len(run["grafts"]) for run in by_policy], sum(len(run["prunes"]) for run in by_policy)
    many = f"{min(grafts)} to {max(grafts)}, {np.mean(grafts):.1f} on average"
    say(f"grafts  {len(entries)} in the schedule; the policy's episodes have {many}")
    if prunes:
        say(f"        and {prunes} prunes in all, which a schedule cannot hold")
    looking, blind = (np.array([run["val_loss"] for run in runs]) for runs in (by_policy, by_schedule))
    say(f"loss    {looking.mean():.4f} by the policy, {blind.mean():.4f} by the schedule: not looking at the run costs")
    say(f"        {Interval.of(blind - looking)} nats (95 % interval, paired t)")
    say(f"wrote   {out}; play it with: esper train schedule --schedule {out}")


def parse_arms(names: str | None, *, on_text: bool, given: Collection[str] = ()) -> list[str]:
    """The arms that a comma-separated list names, or all that can be had; never the policy itself.

    Args:
        names: the list, if there is one.
        on_text: whether GPTs are trained.
        given: arms whose schedule is given.

    Raises:
        UserError: no arm, an unknown one, or one that cannot be had.
    """
    here = [arm for arm in ARMS if not on_text or arm in ANYWHERE or arm in given]
    if names is None:
        return here
    arms = list(dict.fromkeys(ALIASES.get(name.strip(), name.strip()) for name in names.split(",") if name.strip()))
    if not arms:
        raise UserError(f"--arms names no arm: give one or more of {', '.join(ARMS)}.")
    for arm in arms:
        if arm not in (*ARMS, TRAINED):
            raise unknown("arm", arm, [*ARMS, TRAINED, *ALIASES])
        if arm not in (*here, TRAINED):
            mend = "give --schedule FILE, or leave it out" if arm == "schedule" else "leave it out"
            raise UserError(f"arm {arm!r} is worked out on loss laws only, not on text: {mend}.")
    return [arm for arm in arms if arm != TRAINED]


def spec_beside(folder: Path) -> Path | None:
    """The `spec.json` of the `ppo` run that a policy's folder lies in; None where it lies elsewhere."""
    from esper.policies.simic.policy import CHECKPOINTS

    checkpoint = folder.absolute().parent
    path = checkpoint.parents[1] / "spec.json" if checkpoint.parent.name == CHECKPOINTS else None
    return path if path is not None and path.is_file() else None


def spec_for(arguments: CommonArguments, folder: Path, *, on_text: bool) -> "RunSpec":
    """What is played: the preset that is named, else the policy's own, with overrides."""
    import torch

    from esper.pipelines.common.preset import resolve_spec

    own = spec_beside(folder)
    if arguments.preset is None and own is not None:
        arguments = arguments.model_copy(update={"preset": str(own)})
    spec = resolve_spec(arguments, on="here" if on_text else "laws")
    torch.set_num_threads(spec.threads)
    return spec


def instances(spec: "RunSpec", name: SETS, first: int | None) -> "dict[int, Instance]":
    """An instance set, or its first instances; a UserError where it has not so many."""
    from esper.workers.instances import instance_set

    whole = instance_set(name, spec)
    if first is not None and first > len(whole):
        raise UserError(f"--episodes is {first}, but the {name} set has {len(whole)} instances: ask for fewer.")
    return dict(islice(whole.items(), first))


def as_json(entries: "list[Entry]") -> list[dict[str, Any]]:
    """A schedule as `policies/schedule.py` reads it."""
    return [entry.model_dump(mode="json", exclude_none=True) for entry in entries]


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
