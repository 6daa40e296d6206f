"""The actions of `esper policy`: info, evaluate, distill."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from esper.pipelines.common.arguments import CommonArguments
from esper.pipelines.common.preset import describe, resolve_spec
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.common.statistics import Interval
from esper.pipelines.controllers.evaluation import Evaluation, Summaries, as_json
from esper.pipelines.policy import BOUND, OPENLOOP, PLANNER, PLAYED, TRAINED
from esper.platform.console import say
from esper.platform.contracts import GrowthPolicy, Instance
from esper.platform.errors import UserError, unknown
from esper.platform.plugins import arm_target
from esper.platform.spec import RunSpec
from esper.platform.storage import check_unused, write_json
from esper.policies.arms import ALIASES, ArmInputs, make_policy
from esper.policies.named_schedules import NAMED
from esper.policies.planner import PlannerPolicy
from esper.policies.schedule import Entry, SchedulePolicy
from esper.policies.simic.policy import SimicPolicy, policy_file, trained_on
from esper.workers.instances import SetName, instance_set
from esper.workers.laws.surrogate import SurrogateRun, drawn_laws
from esper.workers.run import GrowthRun

if TYPE_CHECKING:
    from esper.pipelines.policy import DistillArguments, EvaluateArguments, InfoArguments

MEMBERS = 32  # draws of the preset's laws that `planner` plays by on loss laws
ON_TEXT = 4  # instances that are played where the user does not say how many
ON_LAWS_ONLY = ("schedule", OPENLOOP, BOUND)  # a schedule may also be given
REACHED = ("val_loss", "diverged", "parameters", "decisions", "parameter_seconds", "tokens", "grafts", "prunes")


def info(arguments: "InfoArguments") -> None:
    """Print a checkpoint's card."""
    file = policy_file(arguments.checkpoint)
    policy = SimicPolicy.load(file)
    known = {name: policy.card[name] for name in ("format", "telemetry_version", "hidden")}
    known["parameters"] = sum(p.numel() for p in policy.net.parameters())
    known |= {name: value for name, value in policy.card["extra"].items() if isinstance(value, int | float | str)}
    known |= {"hosts": ", ".join(trained_on(policy)["hosts"])}
    known |= {"weights": f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}", "file": file.absolute()}
    for name, value in known.items():
        print(f"{name.replace('_', ' '):<18} {value}")


def evaluate(arguments: "EvaluateArguments") -> None:
    """Compare a policy with other arms, and write and print the result."""
    file, on_text, schedules = policy_file(arguments.checkpoint), arguments.data is not None, {}
    policy, spec = SimicPolicy.load(file), spec_for(arguments, file, on_text=on_text)
    if arguments.schedule is not None:
        schedules["schedule"] = SchedulePolicy.load(arguments.schedule).entries
    given = {*schedules, *([] if arguments.laws is None else [PLANNER])}
    arms = parse_arms(arguments.arms, on_text=on_text, given=given)
    inputs = ArmInputs(schedule=arguments.schedule, laws=arguments.laws, spec=spec)
    ready: dict[str, GrowthPolicy] = {TRAINED: policy}
    if PLANNER in arms and PLANNER not in given and not on_text:
        ready[PLANNER] = PlannerPolicy(drawn_laws(spec, range(MEMBERS)))
    for arm in {*schedules, *({*arms} - ready.keys() - {*ON_LAWS_ONLY})}:
        make_policy(arm, inputs)  # refuses a blueprint that the runs lack, laws of others, plug-ins that are none
    chosen = instances(spec, arguments.instances, arguments.episodes or (ON_TEXT if on_text else None), text=on_text)
    place = RunFolder.new(arguments, spec, "evaluate", laws=not on_text)
    place.tell_laws(arguments.laws if on_text else None)
    make_run = partial(GrowthRun, spec, place.tokens) if on_text else partial(SurrogateRun, spec)
    here, where = Evaluation(spec, chosen, make_run, arguments.seed), "text" if on_text else "loss laws"
    write_json(place.out / "spec.json", spec.model_dump(mode="json"))
    say(f"policy  {file}, on {len(chosen)} {arguments.instances} instances, {where}")
    choose(arms, policy, here, schedules)
    played = {}
    for arm in (*[arm for arm in arms if arm != BOUND], TRAINED):
        played[arm] = here.play(arm, partial(_player, arm, ready, schedules, inputs))
        say(f"  {arm}: played")
    bounds = here.bounds() if BOUND in arms else None
    reference = next((arm for arm in ("schedule", "static") if arm in played), None)
    found = rows(played, bounds, reference)
    record = {
        "policy": {"file": str(file.absolute()), **policy.card},
        "on": where,
        "preset": spec.preset,
        "set": arguments.instances,
        "seed": arguments.seed,
        "reference": reference,
        "rows": [row | {"difference": row["difference"] and row["difference"].as_dict()} for row in found],
        "schedules": {arm: as_json(entries) for arm, entries in schedules.items()},
        "instances": {
            id: {
                "instance": instance.model_dump(mode="json"),
                "seed": here.seed_of(id),
                "bound": None if bounds is None else float(bounds[i]),
                "arms": {arm: {key: runs[i][key] for key in REACHED} for arm, runs in played.items()},
            }
            for i, (id, instance) in enumerate(chosen.items())
        },
    }
    write_json(place.out / "evaluation.json", record)
    print(_table(found, reference))
    say("means over the instances, in nats; ± is half of a 95 % interval (paired t)")
    say(f"results: {place.out / 'evaluation.json'}")


def choose(arms: list[str], policy: SimicPolicy, here: Evaluation, schedules: dict[str, list[Entry]]) -> None:
    """Choose, on training instances, the arms' schedules that lack."""
    training = replace(here, instances=instance_set("train", here.spec))
    for arm in ("schedule", OPENLOOP):
        if arm in arms and arm not in schedules:
            say(f"  {arm}: choosing on {len(training.instances)} training instances")
            best = training.best_schedule() if arm == "schedule" else training.median_schedule(policy)[0]
            schedules[arm] = best


def _player(
    arm: str, ready: Mapping[str, GrowthPolicy], schedules: Mapping[str, list[Entry]], inputs: ArmInputs, seed: int
) -> GrowthPolicy:
    if arm in schedules:
        return SchedulePolicy(schedules[arm])
    return ready[arm] if arm in ready else make_policy(arm, replace(inputs, seed=seed))


def rows(
    played: Mapping[str, Summaries], bounds: np.ndarray | None, reference: str | None = None
) -> list[dict[str, Any]]:
    """A row per arm, then the bound: mean `loss`, `to_bound` and paired `difference` to the reference, in nats.

    `closed` is the share of the gap between reference and bound, `grafts` a mean per episode, `diverged` a count.
    """
    losses = {arm: np.array([run["val_loss"] for run in runs]) for arm, runs in played.items()}
    base = losses.get(reference or "")
    gap = 0.0 if bounds is None or base is None else float((base - bounds).mean())
    found = []
    for arm, reached in (losses if bounds is None else losses | {BOUND: bounds}).items():
        runs = played.get(arm, [])
        found.append(
            {
                "arm": arm,
                "loss": float(reached.mean()),
                "to_bound": None if bounds is None or arm == BOUND else float((reached - bounds).mean()),
                "difference": None if base is None or arm == reference else Interval.of(reached - base),
                "closed": float((base - reached).mean()) / gap if base is not None and gap > 0 else None,
                "grafts": float(np.mean([len(run["grafts"]) for run in runs])) if runs else None,
                "diverged": sum(run["diverged"] for run in runs),
            }
        )
    return found


def _table(rows: list[dict[str, Any]], reference: str | None) -> str:
    """The rows as text, without empty columns."""
    names = {"loss": "mean final loss", "to_bound": "to the bound", "closed": "gap closed"}
    forms = {"loss": "{:.4f}", "to_bound": "{:.4f}", "closed": "{:.0%}", "grafts": "{:.1f}"}
    frame = pd.DataFrame(rows).replace({"diverged": {0: None}}).dropna(axis="columns", how="all")
    for column in frame:
        form = forms.get(str(column), "{}")
        frame[column] = ["" if pd.isna(value) else form.format(value) for value in frame[column]]
    return frame.rename(columns=names | {"difference": f"against {reference}"}).to_string(index=False)


def distill(arguments: "DistillArguments") -> None:
    """Write the policy's median schedule, and compare both."""
    check_unused(arguments.out, file=True)
    file = policy_file(arguments.checkpoint)
    policy = SimicPolicy.load(file)
    spec = spec_for(CommonArguments(preset=arguments.preset, set=arguments.set), file, on_text=False)
    chosen = instances(spec, arguments.instances, arguments.episodes)
    say(f"preset  {spec.preset}: {describe(spec)}")
    say(f"policy  {file}, on {len(chosen)} {arguments.instances} instances, loss laws")
    here = Evaluation(spec, chosen, partial(SurrogateRun, spec), arguments.seed)
    entries, by_policy = here.median_schedule(policy)
    write_json(arguments.out, as_json(entries))
    by_schedule = here.play(OPENLOOP, lambda seed: SchedulePolicy(entries))
    for entry in entries:
        print(f"{entry.at:6.1%}  {entry.blueprint}" + (f" at {entry.site}" if entry.site else ""))
    grafts, prunes = (np.mean([len(run[key]) for run in by_policy]) for key in ("grafts", "prunes"))
    say(f"grafts  {len(entries)} in the schedule; the policy's episodes have {grafts:.1f}, and {prunes:.1f} prunes")
    looking, blind = (np.array([run["val_loss"] for run in runs]) for runs in (by_policy, by_schedule))
    say(f"loss    {looking.mean():.4f} by the policy, {blind.mean():.4f} by the schedule: not looking at the run costs")
    say(f"        {Interval.of(blind - looking)} nats (95 % interval, paired t)")
    say(f"wrote   {arguments.out}; play it with: esper train schedule --schedule {arguments.out}")


def parse_arms(names: str | None, *, on_text: bool, given: Collection[str] = ()) -> list[str]:
    """The arms named, without the policy, by default all but the named schedules. UserError for one not to be had."""
    here = [arm for arm in PLAYED if not on_text or arm in given or arm not in ON_LAWS_ONLY]
    if names is None:
        return [arm for arm in here if arm not in NAMED and (arm != PLANNER or arm in given or not on_text)]
    arms = [ALIASES.get(name.strip(), name.strip()) for name in names.split(",")]
    for arm in arms:
        if arm not in (*here, TRAINED) and arm_target(arm) is None:
            raise unknown("arm on text (schedule: with --schedule FILE)" if on_text else "arm", arm, [*here, TRAINED])
    return [arm for arm in dict.fromkeys(arms) if arm != TRAINED]


def spec_for(arguments: CommonArguments, file: Path, *, on_text: bool) -> RunSpec:
    """The named preset, else that of the training in whose folder the policy is."""
    own = [path for folder in file.absolute().parents[:3] if (path := folder / "spec.json").is_file()]
    if arguments.preset is None and own:
        arguments = arguments.model_copy(update={"preset": str(own[0])})
    spec = resolve_spec(arguments, on="here" if on_text else "laws")
    torch.set_num_threads(spec.threads)
    return spec


def instances(spec: RunSpec, name: SetName, first: int | None, *, text: bool = False) -> dict[int, Instance]:
    """The first instances of a set; UserError where it has too few."""
    whole = instance_set(name, spec, text=text)
    if first is not None and first > len(whole):
        raise UserError(f"--episodes is {first}, but the {name} set has {len(whole)} instances: ask for fewer.")
    return dict(islice(whole.items(), first))
