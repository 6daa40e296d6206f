"""Running a sweep in its folder: what is missing, and no more; then the report."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

from esper.pipelines.common.play import barren
from esper.pipelines.common.preset import resolve_spec
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.common.stopping import Stopped, stop_signals
from esper.pipelines.controllers.workers import session
from esper.pipelines.report import write_report
from esper.pipelines.reports.budgets import grouped
from esper.pipelines.reports.page import short_tables
from esper.pipelines.reports.paired_tests import Trials
from esper.pipelines.reports.runs import Run, read_sweeps
from esper.pipelines.sweeps.arms import PPO, STATIC, Arm, policy_input
from esper.pipelines.sweeps.chart_view import share_view
from esper.pipelines.sweeps.log import SUMMARY, TRIAL_SECONDS, SweepLog
from esper.pipelines.sweeps.plan import AT_ONCE, SweepArguments, SweepPlan, parse_policies
from esper.pipelines.sweeps.stages import Batch, Inputs, PointStages, Settled, static_arms
from esper.pipelines.sweeps.tune import run_trials
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.provenance import provenance
from esper.platform.storage import read_json, write_json
from esper.platform.tracking import SYNC_SECONDS, Tracker
from esper.policies.simic.policy import SimicPolicy, policy_file, trained_on
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.tolaria.sampling import opening

STATE = "sweep.json"


class State(Frozen, extra="ignore"):
    """What a resumed sweep needs of its `sweep.json`."""

    points: list[Settled]
    seeds: tuple[int, ...]


def begin(arguments: SweepArguments, name: str = "sweep") -> int:
    """Settle what is asked for, run it, and report; returns 1 if a trial failed."""
    policies = parse_policies(arguments.policy)
    trains = "" not in policies and PPO in map(str.strip, arguments.arms.split(","))
    spec = resolve_spec(arguments, on="fleet" if trains and arguments.train_on == "text" else "here")
    plan = SweepPlan.settled(arguments, spec)
    folder = RunFolder.new(arguments, spec, name)
    files = {policy_input(name): policy_file(path) for name, path in policies.items()}
    files |= {"schedule": arguments.schedule, "laws": arguments.laws}
    folder.tell_laws(arguments.laws)
    with folder.begin("sweep", plan.model_dump(mode="json"), files, [arm.name for arm in plan.arms]) as inputs:
        return compare(folder, plan, inputs)


def resume(out: Path) -> int:
    """Go on with the sweep in `out`. Raises UserError where there is none or its inputs have changed."""
    with RunFolder.reopen(out, "sweep") as folder:
        inputs, plan = folder.check(), SweepPlan.checked(folder.plan, f"the plan of {folder.out}")
        say(f"resume  {folder.out}")
        return compare(folder, plan, inputs)


def compare(folder: RunFolder, plan: SweepPlan, inputs: Inputs) -> int:
    """Run what is missing and report; returns 1 if a trial failed."""
    data, out = str(folder.tokens.manifest), folder.out
    how = f"stopped, with nothing lost; go on with: esper sweep --resume {out}"
    with (
        session(folder.spec),
        stop_signals(how) as check,  # after `ray.init`, which puts in a handler of its own, in C, that aborts
        folder.track({"kind": "sweep", "data": data, **provenance()}, system_metrics=True) as parent,
    ):
        sweep = Sweep(folder, plan, inputs, parent, check)
        try:
            sweep.run()
        except Stopped:
            parent.close("KILLED", TRIAL_SECONDS)
            raise
        summaries, failed, written = sweep.tell()
    say(f"results: {out / SUMMARY}")
    if parent.run_id is None:
        say(f"MLflow was not to be had: send it all, and get the report, with: esper sweep --resume {out}")
        return int(failed)
    try:
        for table in short_tables(write_report(read_sweeps(parent.uri, None, parent.run_id)[0], out / "report")):
            say(table)
        say(f"report:  {out / 'report' / 'report.html'}")
    except UserError as error:
        say(f"no report: {error}")
    say(f"compare: {share_view(parent, folder.spec.budget.axis, summaries) or parent.where}")
    if written:
        say(written)
    return int(failed)


class Sweep:
    """A sweep on the connected cluster; `check` is called often, and ends it by raising."""

    def __init__(
        self, folder: RunFolder, plan: SweepPlan, inputs: Inputs, parent: Tracker, check: Callable[[], None]
    ) -> None:
        self._folder, self._plan, self._parent = folder, plan, parent
        points, path = plan.points(folder.spec), folder.out / STATE
        given = {arm.label: inputs.get(policy_input(arm.policy)) for arm in plan.arms if arm.name == PPO}
        self._learned = {label: trained_on(SimicPolicy.load(path)) for label, path in given.items() if path}
        self._log, settled = SweepLog(folder, parent, check), [Settled() for _ in points]
        self._seeds = plan.seeds if plan.width is None else plan.seeds[:AT_ONCE]  # begun
        if path.exists():
            state = State.checked(read_json(path, str(path), "the state of a sweep"), str(path))
            settled, self._seeds = state.points, state.seeds
        if len(settled) != len(points):
            raise UserError(f"{path} is not what this sweep wrote: restore it, or start the sweep anew.")
        self._points = [
            PointStages(folder, plan, point, before, inputs, self._log)
            for point, before in zip(points, settled, strict=True)
        ]
        for stages in self._points:
            stages.trainer = self._points[stages.point.trains]

    def run(self) -> None:
        self._parent.artifact(self._folder.out / "spec.json")
        for point in [stages.point for stages in self._points] if self._plan.compared else ():
            run = SurrogateRun(point.spec)
            run.vocab_size = self._folder.tokens.manifest.vocab_size
            run.reset()
            if told := barren(run):
                say(f"{point}{told}")
        seconds, sent = TRIAL_SECONDS, False  # where the sweep is stopped
        try:
            self._run(chain(point.choices(), point.tests(self._seeds)) for point in self._points)
            while more := self._more_seeds():
                self._seeds += more
                self._run(point.tests(more) for point in self._points)
            seconds = SYNC_SECONDS
        finally:
            sent = self._log.close([stages.controller for stages in self._points], seconds)
            self._keep()
        if not sent:
            say(f"MLflow has not had everything: send the rest with: esper sweep --resume {self._folder.out}")

    def _run(self, stages: Iterable[Iterator[Batch]]) -> None:
        """Run what is missing of each grid point's batches, side by side."""
        for batches in zip_longest(*stages):
            now = [batch for batch in batches if batch is not None]
            stage = "+".join(dict.fromkeys(stage for stage, trials, _ in now if trials))
            wanted = {trial: wanted for _, trials, wanted in now for trial in trials}
            if missing := self._log.begin(stage, wanted):
                run_trials(stage, missing, self._folder, self._log)
            self._keep()

    def _more_seeds(self) -> tuple[int, ...]:
        """The test seeds to add: some while an arm's interval is wider than it may be and some are left."""
        plan, begun, arms = self._plan, len(self._seeds), [arm.label for arm in self._plan.compared]
        if plan.width is None:
            return ()
        of_trial = lambda trial: {"summary": self._log.summary(trial) or {}, **trial.tags()}  # noqa: E731
        runs = [Run("", "", name, status="", **of_trial(trial)) for name, trial in self._log.trials.items()]
        points = [Trials(runs, stages.record(), self._labels(), sequential=True) for stages in self._points]
        means = [row for group in grouped(points) for row in group.rows if row.budget is None and row.arm in arms]
        widths = [(row.arm, row.interval.width) for row in means if row.interval]
        label, width = max(widths, key=itemgetter(1), default=("", 0.0))
        more = plan.seeds[begun : begun + AT_ONCE] if width > plan.width else ()
        told = f"the interval of {label}'s regret is {width:.4f} nats wide" if label else "no arm has a regret"
        say(f"seeds   {begun} of at most {len(plan.seeds)}: {told}" + f"; {len(more)} more" * bool(more))
        return more

    def tell(self) -> tuple[list[dict[str, Any]], bool, str]:
        """Write and print the test runs' summaries; returns these, if a trial failed, and what the best writes."""
        tests = [trial for trial in self._log.trials.values() if trial.purpose == "test"]
        found = [(trial, self._log.summary(trial)) for trial in tests]
        summaries = [{**summary, "arm": trial.point.row(trial.arm)} for trial, summary in found if summary is not None]
        write_json(self._folder.out / SUMMARY, summaries)
        self._parent.artifact(self._folder.out / SUMMARY)
        failures = {name: trial["error"] for name, trial in self._trials().items() if trial["error"]}
        for name, why in failures.items():
            say(f"failed  {name}: {why}")
        told = [
            (summary["val_loss"], f"{trial.point}{trial.arm.label} writes: {opening(summary['sample'])}")
            for trial, summary in found
            if summary is not None and "sample" in summary
        ]
        return summaries, bool(failures), min(told, default=(0, ""))[1]

    def _statics(self) -> list[Arm]:
        """The static sizes of any grid point."""
        sizes = dict.fromkeys(arm.size for stages in self._points for arm in stages.statics if arm.size)
        return static_arms(sizes, self._folder.spec)

    def _labels(self) -> list[str]:
        """Of the arms, static ones first."""
        return [arm.label for arm in (*self._statics(), *(arm for arm in self._plan.arms if arm.name != STATIC))]

    def _keep(self) -> None:
        """Write `sweep.json`: the report and a resumed sweep read it."""
        points = [stages.record() for stages in self._points]
        state = {
            **self._plan.model_dump(mode="json", include={"width", "tuning_seeds", "command"}),
            "seeds": self._seeds,
            "most_seeds": len(self._plan.seeds),
            "sizes": [str(arm.size) for arm in self._statics()],
            "arms": self._labels(),
            "rates_tuned": all(point.get("bracketed") for point in points),
            "points": points,
            "controller": points[0].get("controller"),
            "policies": self._learned,
            "trials": self._trials(),
        }
        write_json(self._folder.out / STATE, state)
        self._parent.artifact(self._folder.out / STATE)

    def _trials(self) -> dict[str, dict[str, Any]]:
        """By name: tags, whether done, failed or missing, and why."""
        found = {}
        for name, trial in self._log.trials.items():
            error = self._log.failures.get(name)
            status = {"status": "failed" if error else "missing", "error": error or "it has not been run to its end"}
            done = self._log.summary(trial) is not None
            found[name] = trial.tags() | ({"status": "done", "error": None} if done else status)
        return found
