"""Compare arms at an equal budget: arms × sizes × seeds × a grid, under Ray Tune, with the curves in MLflow.

    python pipelines/sweep.py --arms static,tamiyo --sizes 1,2,3 --seeds 5
    esper sweep --arms static,onejump,gradual,tamiyo --sizes 1,2,3,4 --seeds 5 --tune-lr
    esper sweep --arms static,tamiyo,ppo --policy runs/ppo-20260101-120000
    esper sweep --arms static,ppo                   # no policy given: trains one first, on the same spec; without a
                                                    # GPU the preset is then `demo`
    esper sweep --resume runs/sweep-20260101-120000 # go on where it was stopped or killed: what is missing, and no more

Leaves `sweep.json` (plan, what was chosen on tuning seeds, every trial's state), `summary.json` (a list of the test
runs' summaries), a folder per trial, and the report (`esper report`); in MLflow a parent run with a child per trial.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from esper.pipelines.common.arguments import ResumableArguments, main_guard
from esper.pipelines.common.run_folder import Job, open_job, resolve_spec
from esper.pipelines.common.stopping import Stopped, StopSignals
from esper.pipelines.controllers.workers import gpus_needed
from esper.pipelines.report import write_report
from esper.pipelines.sweeps.chart_view import share_view
from esper.pipelines.sweeps.controller import TrainedOn, trained_policy
from esper.pipelines.sweeps.entrants import SWEEP_ARMS, parse_sizes
from esper.pipelines.sweeps.grid import Point
from esper.pipelines.sweeps.log import AWAY_SECONDS, SweepLog
from esper.pipelines.sweeps.plan import PLAN, Contestants, Plan, with_own_inputs
from esper.pipelines.sweeps.stages import Stages
from esper.pipelines.sweeps.table import arm_table
from esper.pipelines.sweeps.trial import Trial
from esper.pipelines.sweeps.tune import run_trials
from esper.platform import cluster
from esper.platform.checkpoint import below
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.provenance import commit, provenance
from esper.platform.spec import RunSpec, saved_spec
from esper.platform.storage import alone, read_json, write_json
from esper.platform.tracking import Tracker, new_key, sync, synced
from esper.platform.tracking_store import connect, tracking_uri
from esper.policies.arms import ALIASES
from esper.workers.tolaria.data import Manifest

STATE = "sweep.json"
ANOTHER_PROBLEM = ("host.", "data.", "clock.", "budget.axis", "optimizer.")
"""Settings under which a preset's range of budgets says nothing."""


class SweepArguments(ResumableArguments):
    """Compare arms at an equal budget."""

    arms: Annotated[
        str,
        Field(
            title="A,B,C",
            description=f"Arms, separated by commas, of {', '.join([*SWEEP_ARMS, *ALIASES])}. random, static_final and "
            "static_lrpath follow another arm: static_final:tamiyo.",
        ),
    ] = "static,tamiyo"
    sizes: Annotated[
        str | None, Field(title="1,2,4", description="Layers of the static sizes; none: the preset's own only.")
    ] = None
    seeds: Annotated[int, Field(ge=1, le=1000, description="Test seeds of each arm: --seed and those after it.")] = 1
    tuning_seeds: Annotated[
        int, Field(ge=0, le=100, description="Other seeds, that sizes, schedules and rates are chosen on.")
    ] = 2
    grid: list[str] = Field(
        default=[], title="KEY=A,B", description="Compare at each of these values; may be given for several keys."
    )
    tune_lr: Annotated[bool, Field(description="Find the learning rate of each static size, on tuning seeds.")] = False
    policy: Annotated[Path | None, Field(description="For ppo: a trained policy; without one it is trained first.")] = (
        None
    )
    train_on: Annotated[
        TrainedOn, Field(description="Where no --policy is given: on text, or on loss laws fitted to static runs.")
    ] = "text"
    schedule: Annotated[Path | None, Field(title="FILE", description="For schedule: a JSON list of grafts.")] = None


def run(arguments: SweepArguments) -> int:
    """Settle, run the trials, report; 1 if a trial failed."""
    if arguments.resume is not None:
        return resume(arguments, arguments.resume)
    plan, spec = settle(arguments)
    job = open_job(arguments, spec, "sweep")
    return compare(job, plan.model_copy(update={"data": job.data}))


def settle(arguments: SweepArguments) -> tuple[Plan, RunSpec]:
    """The plan and the spec; what is not allowed is refused before anything starts.

    Raises:
        UserError: it is not.
    """
    wanted = {part.partition(":")[0].strip() for part in arguments.arms.split(",")}
    fleet = "ppo" in wanted and arguments.policy is None and arguments.train_on == "text"
    spec = resolve_spec(arguments, on="fleet" if fleet else "here")
    own = [override.partition("=")[0] for override in arguments.set]
    plan = Plan.checked(
        {
            **arguments.model_dump(include={"arms", "seed", "seeds", "tuning_seeds", "tune_lr", "train_on", "task"}),
            "sizes": parse_sizes(arguments.sizes, spec),
            "grid": arguments.grid,
            "policy": arguments.policy and arguments.policy.absolute(),
            "schedule": arguments.schedule and arguments.schedule.absolute(),
            "own": own,
            "data": Path(),
            "key": new_key(),
            "store": tracking_uri(),
            "command": sys.argv,
            "commit": commit() or "unknown",
        },
        "the arguments",
    )
    contestants = plan.contestants(spec)
    return plan, with_range(spec, [*own, *contestants.points[0].values])


def with_range(spec: RunSpec, changed: Sequence[str]) -> RunSpec:
    """Without the preset's range of budgets, where what was changed makes it another problem."""
    if "budget.interior" in changed or not any(key.startswith(ANOTHER_PROBLEM) for key in changed):
        return spec
    return spec.overridden({"budget.interior": None})


def resume(arguments: SweepArguments, out: Path) -> int:
    """Go on with the sweep in `out`.

    Raises:
        UserError: other arguments are given, or there is no sweep.
    """
    plan = Plan.checked(read_json(out / PLAN, f"--resume {out}", "the folder of an `esper sweep`"), str(out / PLAN))
    spec = saved_spec(out / "spec.json")
    job = Job(spec, plan.data, out.absolute())
    job.open_data()
    say(f"resume  {out}")
    os.environ.setdefault("MLFLOW_TRACKING_URI", plan.store)
    return compare(job, plan)


def compare(job: Job, plan: Plan) -> int:
    """Run what is missing and report; 1 if a trial failed."""
    with ExitStack() as stack:
        stack.enter_context(alone(job.out))
        if not (job.out / PLAN).exists():
            job.begin()
            plan = with_own_inputs(plan, job.out)
            write_json(job.out / PLAN, plan.model_dump(mode="json"))
        contestants = plan.contestants(job.spec)
        stack.enter_context(cluster.session(gpus=gpus_needed(job.spec)))
        signals = stack.enter_context(StopSignals())  # last: `ray.init` puts in a handler of its own, in C, that aborts
        parent = Tracker.start(
            job.out,
            f"esper-{plan.task}",
            job.out.name,
            tags={"kind": "sweep", "preset": job.spec.preset, "data": told_data(job), **provenance(), **begun(plan)},
            params=job.spec.model_dump(mode="json"),
            key=plan.key,
            system_metrics=True,
        )
        try:
            with parent:
                failures = Sweep(job, plan, contestants, parent, signals.check).run()
        except Stopped as stopped:
            how = f"stopped, with nothing lost; go on with: esper sweep --resume {job.out}"
            raise Stopped(stopped.number, str(stopped) or how) from None
        report(job, parent)
    return 1 if failures else 0


def begun(plan: Plan) -> dict[str, str]:
    """The commit as a tag: that of the sweep's beginning, and another one that it goes on with."""
    now = commit() or "unknown"
    return {"commit": plan.commit if now == plan.commit else f"{plan.commit}, resumed at {now}"}


def told_data(job: Job) -> str:
    """The text, in a line."""
    manifest = Manifest.read(job.data)
    return f"{manifest.source}, {manifest.tokenizer}, {manifest.splits['train'].tokens:,} training tokens"


def report(job: Job, parent: Tracker) -> None:
    """Write the report, and say where everything is."""
    say(f"results: {job.out / 'summary.json'}")
    if parent.run_id is None:
        say(f"MLflow was not to be had: send it everything, and get the report, with: esper sweep --resume {job.out}")
        return
    try:
        write_report(connect(parent.uri), parent.run_id, job.out / "report")
    except UserError as error:
        say(f"no report: {error}")
    else:
        say(f"report:  {job.out / 'report' / 'report.html'}")
    say(f"compare: {share_view(parent, job.spec.budget.axis) or parent.where}")


class Sweep:
    """A sweep on the connected cluster."""

    def __init__(
        self, job: Job, plan: Plan, contestants: Contestants, parent: Tracker, check: Callable[[], None]
    ) -> None:
        self._job, self._plan, self._parent, self._check = job, plan, parent, check
        storage = str(job.out / "saves")
        if job.spec.fleet.storage is not None:
            storage = below(job.spec.fleet.storage, plan.key)
        self._log = SweepLog(
            job.out,
            experiment=f"esper-{plan.task}",
            parent=parent,
            key=plan.key,
            manifest=Manifest.read(job.data),  # `open_job` has verified the shards
            storage=storage,
            check=check,
        )
        self._contestants = contestants
        self._controllers: dict[int, dict[str, Any]] = {}
        for point in contestants.points if plan.policy is not None else ():
            self._controllers[point.index] = {"checkpoint": str(plan.policy), "trained_on": "given"}
        for index, point in enumerate(self._before().get("points", ())):
            if point["controller"] is not None:
                self._controllers[index] = point["controller"]
        self._stages = Stages(
            contestants,
            self._log,
            partial(run_trials, data=job.data, log=self._log, fleet=job.spec.fleet, storage=storage),
            self._train if plan.trains() else None,
            self._keep,
        )

    def run(self) -> int:
        """Everything that is missing; how many trials failed."""
        parent = self._parent
        parent.artifact(self._job.out / "spec.json")
        for index, found in self._controllers.items():
            if found["trained_on"] != "given":  # MLflow may have been away when it was trained
                self._keep_policy(index)
        try:
            self._stages.run()
        finally:
            sent = self._log.close() and self._send_controllers()
            self._keep()
        tests = [trial for trial in self._stages.trials.values() if trial.purpose == "test"]
        found = [(trial, self._log.summary(trial)) for trial in tests]
        summaries = [{**summary, "arm": trial.row} for trial, summary in found if summary is not None]
        write_json(self._job.out / "summary.json", summaries)
        parent.artifact(self._job.out / "summary.json")
        if summaries:
            say(arm_table(summaries))
        failures = self._failures()
        for name, why in failures.items():
            say(f"failed  {name}: {why}")
        if not sent:
            parent.close(seconds=AWAY_SECONDS)  # it would not take that either
            if parent.run_id is not None:
                say(f"MLflow has not had everything: send the rest with: esper sweep --resume {self._job.out}")
        return len(failures)

    def _failures(self) -> dict[str, str]:
        """Why a trial has no result, by its name."""
        told = self._log.failures | {name: trial["error"] for name, trial in self._stages.impossible.items()}
        missing = [t.name for t in self._stages.trials.values() if t.name not in told and self._log.summary(t) is None]
        return told | dict.fromkeys(missing, "it has not been run to its end")

    def _train(self, point: Point, spec: RunSpec, tuning: Any) -> Path:
        out = self._controller_folder(point.index)
        found = trained_policy(
            self._job,
            spec,
            out,
            on=self._plan.train_on,
            seed=self._plan.seed,
            own=self._plan.own,
            tuning=tuning,
            parent=self._parent,
            check=self._check,
        )
        self._controllers[point.index] = found
        self._keep_policy(point.index)
        return Path(found["checkpoint"])

    def _keep_policy(self, point: int) -> None:
        """Keep a trained controller with the sweep's run in MLflow."""
        policy = Path(self._controllers[point]["checkpoint"]) / "policy"
        self._parent.artifact(policy, f"policy-point{point}" if self._contestants.several else "policy")

    def _send_controllers(self) -> bool:
        """Give MLflow what it has not had of their trainings; whether it has had everything."""
        trained = [
            self._controller_folder(i) for i, found in self._controllers.items() if found["trained_on"] != "given"
        ]
        return all(synced(out, self._parent.uri) or sync(out, self._parent.uri) for out in trained)

    def _controller_folder(self, point: int) -> Path:
        return self._job.out / (f"ppo-{point}" if self._contestants.several else "ppo")

    def _before(self) -> dict[str, Any]:
        """What an earlier start of this sweep has written."""
        path = self._job.out / STATE
        return read_json(path, str(path), "the state of a sweep") if path.exists() else {}

    def _keep(self) -> None:
        """Write `sweep.json`: what the report reads."""
        c = self._contestants
        points = [
            {
                "grid": point.grid,
                "budget": {"axis": point.spec.budget.axis, "amount": point.spec.budget.amount},
                "spec": point.spec.model_dump(mode="json"),
                "rates": settled.rates,
                "curve": settled.curve and vars(settled.curve),
                "size": settled.size,
                "schedule": settled.schedule,
                "controller": self._controllers.get(point.index),
            }
            for point, settled in zip(c.points, self._stages.settled, strict=True)
        ]
        state = {
            "arms": [entrant.label for entrant in c.entrants],
            "sizes": list(c.sizes),
            "seeds": list(c.seeds),
            "tuning_seeds": list(c.tuning_seeds),
            "rates_tuned": all(settled.bracketed for settled in self._stages.settled),
            "points": points,
            "controller": next(iter(self._controllers.values()), None),
            "command": self._plan.command,
            "trials": self._before().get("trials", {})
            | self._stages.impossible
            | {trial.name: self._state_of(trial) for trial in self._stages.trials.values()},
        }
        write_json(self._job.out / STATE, state)
        self._parent.artifact(self._job.out / STATE)

    def _state_of(self, trial: Trial) -> dict[str, Any]:
        error = self._log.failures.get(trial.name)
        status = "done" if self._log.summary(trial) is not None else "failed" if error else "missing"
        kept = {"label", "arm", "size", "seed", "purpose", "grid"}
        return {**{key: value for key, value in trial.tags().items() if key in kept}, "status": status, "error": error}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, SweepArguments, "esper sweep", argv)


if __name__ == "__main__":
    sys.exit(main())
