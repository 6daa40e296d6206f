"""The actions of `esper policy`: info; evaluate and distill, which play every instance from the same seeds; fit."""

import hashlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track

from esper.pipelines.common.arguments import CommonArguments
from esper.pipelines.common.ended_runs import ended_runs
from esper.pipelines.common.play import play
from esper.pipelines.common.preset import describe, resolve_spec
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.common.statistics import Interval
from esper.pipelines.policy import BOUND, PLAYED, DistillArguments, EvaluateArguments, FitArguments, InfoArguments
from esper.pipelines.sweeps.arms import OPENLOOP, PPO
from esper.platform.console import counted, say
from esper.platform.contracts import GrowthPolicy, Instance
from esper.platform.errors import UserError, unknown
from esper.platform.plugins import arm_target
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec
from esper.platform.storage import check_unused, write_json, write_text
from esper.policies.arms import ALIASES, NEEDS, ArmInputs, make_policy
from esper.policies.planner import PlannerPolicy
from esper.policies.schedule import NAMED, Entry, SchedulePolicy, as_json, median_schedule
from esper.policies.simic.policy import SimicPolicy, policy_file, trained_on
from esper.workers.instances import SetName, instance_set
from esper.workers.laws.fit import annealed_losses, fitted, held_out_residual
from esper.workers.laws.oracle import best_fixed_schedule, bound
from esper.workers.laws.surrogate import SurrogateRun, drawn_laws
from esper.workers.run import GrowthRun

PLANNER = "planner"
MEMBERS = 32  # draws of the preset's laws that `planner` plays by on loss laws
ON_TEXT = 4  # instances that are played where the user does not say how many
ON_LAWS_ONLY = ("schedule", OPENLOOP, BOUND)  # a schedule may also be given
REACHED = ("val_loss", "diverged", "parameters", "decisions", "parameter_seconds", "tokens", "grafts", "prunes")


Summaries = list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """The instances and runs on which arms are compared."""

    spec: RunSpec  # what is played
    instances: Mapping[int, Instance]  # id → instance
    make_run: Callable[[], GrowthRun | SurrogateRun]  # makes the run that an arm plays on
    seed: int = 0  # from which each instance's own is derived, whatever the arm

    def seed_of(self, id: int) -> int:
        """The seed of an instance's episodes, the same for all arms."""
        return derive(self.seed, "evaluate", id)

    def play(self, arm: str, make_policy: Callable[[int], GrowthPolicy]) -> Summaries:
        """An arm's summary per instance; `make_policy` makes its controller from an episode's seed."""
        run, found, console = self.make_run(), [], Console(stderr=True)
        for id in track(self.instances, arm, console=console, transient=True, disable=not sys.stderr.isatty()):
            run.reset(self.instances[id], self.seed_of(id))
            found.append(play(run, make_policy(self.seed_of(id)), arm=arm))
        return found

    def best_schedule(self) -> list[Entry]:
        """The fixed schedule with the lowest mean loss here, by local search on loss laws."""
        found = best_fixed_schedule(self.spec, self.instances.values())
        return [Entry(at=at, blueprint=blueprint) for at, blueprint in found]

    def median_schedule(self, policy: GrowthPolicy) -> tuple[list[Entry], Summaries]:
        """The median schedule of a policy's episodes here, and their summaries."""
        shallow = min(self.instances, key=lambda id: self.instances[id].n_layer or self.spec.host.n_layer)
        sites = self.make_run().reset(self.instances[shallow], self.seed_of(shallow)).site_ids
        played = self.play("ppo", lambda seed: policy)
        return median_schedule(played, self.spec.budget.decisions, set(sites)), played


def info(arguments: InfoArguments) -> None:
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


def evaluate(arguments: EvaluateArguments) -> None:
    """Compare a policy with other arms, and write and print the result."""
    file, on_text = policy_file(arguments.checkpoint), arguments.data is not None
    policy, spec = SimicPolicy.load(file), spec_for(arguments, file, on_text=on_text)
    given = {name for name, path in (("schedule", arguments.schedule), (PLANNER, arguments.laws)) if path is not None}
    arms = parse_arms(arguments.arms, on_text=on_text, given=given)
    inputs = ArmInputs(schedule=arguments.schedule, laws=arguments.laws, spec=spec)

    def made(arm: str, seed: int) -> GrowthPolicy:
        return make_policy(arm, replace(inputs, seed=seed))

    makers: dict[str, Callable[[int], GrowthPolicy]] = {PPO: lambda seed: policy}
    makers |= {arm: partial(made, arm) for arm in arms if arm in given or arm not in ON_LAWS_ONLY}
    if PLANNER in arms and PLANNER not in given and not on_text:
        planner = PlannerPolicy(drawn_laws(spec, range(MEMBERS)))
        makers[PLANNER] = lambda seed: planner
    for make in makers.values():
        make(0)  # refuses a blueprint that the runs lack, laws of others, plug-ins that are none
    chosen = instances(spec, arguments.instances, arguments.episodes or (ON_TEXT if on_text else None), text=on_text)
    place = RunFolder.new(arguments, spec, "evaluate", laws=not on_text)
    place.tell_laws(arguments.laws if on_text else None)
    make_run = partial(GrowthRun, spec, place.tokens) if on_text else partial(SurrogateRun, spec)
    here, where = Evaluation(spec, chosen, make_run, arguments.seed), "text" if on_text else "loss laws"
    write_json(place.out / "spec.json", spec.model_dump(mode="json"))
    say(f"policy  {file}, on {len(chosen)} {arguments.instances} instances, {where}")
    training = replace(here, instances=instance_set("train", spec))
    schedules = {"schedule": SchedulePolicy.load(arguments.schedule).entries} if arguments.schedule else {}
    for arm in [arm for arm in ("schedule", OPENLOOP) if arm in arms and arm not in schedules]:
        say(f"  {arm}: choosing on {len(training.instances)} training instances")
        schedules[arm] = training.best_schedule() if arm == "schedule" else training.median_schedule(policy)[0]
    makers |= {arm: partial(lambda entries, seed: SchedulePolicy(entries), own) for arm, own in schedules.items()}
    played = {}
    for arm in (*[arm for arm in arms if arm != BOUND], PPO):
        played[arm] = here.play(arm, makers[arm])
        say(f"  {arm}: played")
    bounds = None
    if BOUND in arms:
        bounds = np.array([bound(spec, instance, seed=here.seed_of(id)) for id, instance in chosen.items()])
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


def rows(
    played: Mapping[str, Summaries], bounds: np.ndarray | None, reference: str | None = None
) -> list[dict[str, Any]]:
    """A row per arm, then the bound: means in nats, `closed` of the gap between them, `grafts`, `diverged`."""
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


def distill(arguments: DistillArguments) -> None:
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


def fit(arguments: FitArguments) -> None:
    """Fit laws to the runs in a folder, and write and say what they are."""
    check_unused(arguments.out, file=True)
    found = list(ended_runs(arguments.runs))
    laws, law = fitted(arguments.runs, [(run.spec, run.text, run.summary) for run in found])
    held_out = held_out_residual(found[0].spec, [own for run in found if (own := annealed_losses(run.summary))])
    laws, unsound = laws.model_copy(update={"held_out": held_out}), len(found) - laws.runs
    write_text(arguments.out, laws.model_dump_json(indent=2) + "\n")
    say(f"runs    {laws.runs}, {laws.grown} of which grew; {counted(unsound, 'run')} left out as unsound")
    say("law     " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(law).items()))
    say(f"misses  {laws.residual:.4f} nats (rms) over {laws.losses} annealed losses")
    if laws.held_out is not None:
        say(f"        {laws.held_out:.4f} over growing runs, each by a law fitted without those of its seed")
    say(f"wrote   {arguments.out}; play by it with: esper train planner --laws {arguments.out}")


def parse_arms(names: str | None, *, on_text: bool, given: Collection[str] = ()) -> list[str]:
    """The arms named, without the policy, by default all but the named schedules. UserError for one not to be had."""
    here = [arm for arm in PLAYED if not on_text or arm in given or arm not in ON_LAWS_ONLY]
    if names is None:
        return [arm for arm in here if arm not in NAMED and (arm != PLANNER or arm in given or not on_text)]
    arms = [ALIASES.get(name.strip(), name.strip()) for name in names.split(",")]
    for arm in arms:
        if arm not in (*here, PPO) and arm_target(arm) is None:
            raise unknown("arm on text (schedule: with --schedule FILE)" if on_text else "arm", arm, [*here, PPO])
    for arm in sorted(set(given) - set(arms)):
        raise UserError(f"--{NEEDS[arm][0]} is for arm {arm!r}, which --arms lacks: add it, or leave the file out.")
    return [arm for arm in dict.fromkeys(arms) if arm != PPO]


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
