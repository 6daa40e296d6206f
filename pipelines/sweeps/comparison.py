"""Running a sweep in its folder: what is missing, and no more; then the report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from esper.pipelines.common.preset import resolve_spec
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.common.stopping import Stopped, StopSignals
from esper.pipelines.controllers.workers import gpus_needed
from esper.pipelines.report import write_report
from esper.pipelines.sweeps.arms import PPO, Arm, parse_arms
from esper.pipelines.sweeps.chart_view import curve_names, share_view
from esper.pipelines.sweeps.log import TRIAL_SECONDS, SweepLog
from esper.pipelines.sweeps.plan import Point, SweepArguments, SweepPlan
from esper.pipelines.sweeps.stages import STAGES, PointStages, Settled
from esper.pipelines.sweeps.trials import Trial
from esper.pipelines.sweeps.tune import run_trials
from esper.platform import cluster
from esper.platform.checkpoint import CheckpointStore, below
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.provenance import provenance
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_json
from esper.platform.tracking import Tracker
from esper.platform.tracking_store import connect
from esper.platform.tracking_sync import SYNC_SECONDS
from esper.policies.simic.policy import policy_file

STATE = "sweep.json"
Inputs = Mapping[str, Path]  # the files that were given


def begin(arguments: SweepArguments, name: str = "sweep") -> int:
    """Settle what is asked for, run it, and report; returns 1 if a trial failed."""
    trains = arguments.policy is None and Arm(name=PPO) in parse_arms(arguments.arms, ())
    spec = resolve_spec(arguments, on="fleet" if trains and arguments.train_on == "text" else "here")
    plan = SweepPlan.settled(arguments, spec)
    folder = RunFolder.new(arguments, spec, name)
    policy = None if arguments.policy is None else policy_file(arguments.policy)
    with folder.begin("sweep", plan, {"policy": policy, "schedule": arguments.schedule}) as inputs:
        return compare(folder, plan, inputs)


def resume(out: Path) -> int:
    """Go on with the sweep in `out`. Raises UserError where there is none or its inputs have changed."""
    with RunFolder.reopen(out, "sweep", SweepPlan) as (folder, plan):
        inputs = folder.check()
        say(f"resume  {folder.out}")
        return compare(folder, plan, inputs)


def compare(folder: RunFolder, plan: SweepPlan, inputs: Inputs) -> int:
    """Run what is missing and report; returns 1 if a trial failed."""
    manifest = folder.tokens.manifest
    data = f"{manifest.source}, {manifest.tokenizer}, {manifest.splits['train'].tokens:,} training tokens"
    with (
        cluster.session(gpus=gpus_needed(folder.spec)),
        StopSignals() as signals,  # after `ray.init`, which puts in a handler of its own, in C, that aborts
    ):
        parent = folder.track({"kind": "sweep", "data": data, **provenance()}, system_metrics=True)
        with parent:
            try:
                summaries, failures = Sweep(folder, plan, inputs, parent, signals.check).run()
            except Stopped as stopped:
                parent.close("KILLED", TRIAL_SECONDS)
                how = f"stopped, with nothing lost; go on with: esper sweep --resume {folder.out}"
                raise Stopped(stopped.number, str(stopped) or how) from None
        report(folder, parent, summaries)
    return 1 if failures else 0


def report(folder: RunFolder, parent: Tracker, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Write the report, and say where everything is."""
    say(f"results: {folder.out / 'summary.json'}")
    if parent.run_id is None:
        say(f"MLflow was not to be had: send it all, and get the report, with: esper sweep --resume {folder.out}")
        return
    try:
        write_report(connect(parent.uri), parent.run_id, folder.out / "report")
    except UserError as error:
        say(f"no report: {error}")
    else:
        say(f"report:  {folder.out / 'report' / 'report.html'}")
    say(f"compare: {share_view(parent, folder.spec.budget.axis, summaries) or parent.where}")


class Sweep:
    """A sweep on the connected cluster; `check` is called often, and ends it by raising."""

    def __init__(
        self, folder: RunFolder, plan: SweepPlan, inputs: Inputs, parent: Tracker, check: Callable[[], None]
    ) -> None:
        self._folder, self._plan, self._parent, self._check = folder, plan, parent, check
        storage = folder.spec.fleet.storage
        self._saves = str(folder.out / "saves") if storage is None else below(storage, folder.key)
        path, points = folder.out / STATE, plan.points(folder.spec)
        curves = curve_names(point.row(arm) for point in points for arm in plan.arms)
        self._log = SweepLog(folder, parent, CheckpointStore(self._saves), curves, check)
        self._trials: dict[str, Trial] = {}
        state = (
            read_json(path, str(path), "the state of a sweep") if path.exists() else {"settled": [{} for _ in points]}
        )
        before = state.get("settled") if isinstance(state, dict) else None
        if not isinstance(before, list) or len(before) != len(points):
            raise UserError(f"{path} is not what this sweep wrote: restore it, or start the sweep anew.")
        self._points = [
            PointStages(plan, point, Settled.checked(settled, str(path)), inputs, self._log, self._train)
            for point, settled in zip(points, before, strict=True)
        ]

    def run(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Run everything that is missing; returns the test runs' summaries, and each failed trial's reason by name."""
        out = self._folder.out
        self._parent.artifact(out / "spec.json")
        seconds = TRIAL_SECONDS  # where the sweep is stopped
        try:
            self._walk()
            seconds = SYNC_SECONDS
        finally:
            sent = self._log.close([self._controller_folder(stages.point) for stages in self._points], seconds)
            self._keep()
        tests = [trial for trial in self._trials.values() if trial.purpose == "test"]
        found = [(trial, self._log.summary(trial)) for trial in tests]
        summaries = [{**summary, "arm": trial.point.row(trial.arm)} for trial, summary in found if summary is not None]
        write_json(out / "summary.json", summaries)
        self._parent.artifact(out / "summary.json")
        if summaries:
            say(arm_table(summaries))
        failures = {name: error for name in self._trials if (error := self._state(name)["error"])}
        for name, why in failures.items():
            say(f"failed  {name}: {why}")
        if not sent:
            say(f"MLflow has not had everything: send the rest with: esper sweep --resume {out}")
        return summaries, failures

    def _walk(self) -> None:
        walks = [stages.batches() for stages in self._points]
        waiting = dict(enumerate(map(next, walks)))
        for stage in STAGES:
            while now := {i: batch for i, batch in waiting.items() if batch[0] == stage}:
                trials = {trial: wanted for _, group, wanted in now.values() for trial in group}
                self._trials |= {trial.name: trial for trial in trials}
                missing = [trial for trial in self._log.missing(trials) if trials[trial]]
                if missing:
                    self._log.begin(stage, missing)
                    run_trials(stage, missing, self._folder, self._log, self._saves)
                for i in now:
                    if (batch := next(walks[i], None)) is None:
                        del waiting[i]
                    else:
                        waiting[i] = batch
                self._keep()

    def _train(self, point: Point, spec: RunSpec, tuning: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from esper.pipelines.sweeps.controller import trained  # RLlib takes seconds to import

        out = self._controller_folder(point)
        return trained(out, self._folder, self._plan, spec, tuning, self._parent, self._check)

    def _controller_folder(self, point: Point) -> Path:
        return self._folder.out / (f"ppo-{point.index}" if point.several else "ppo")

    def _keep(self) -> None:
        """Write `sweep.json`: the report and a resumed sweep read it."""
        points = [
            {
                "grid": stages.point.grid,
                "budget": stages.point.spec.budget.model_dump(mode="json", include={"axis", "amount"}),
                "spec": stages.point.spec.model_dump(mode="json"),
                "spent": stages.spent([t for t in self._trials.values() if t.point is stages.point]),
                **stages.settled.model_dump(mode="json"),
            }
            for stages in self._points
        ]
        plan = self._plan
        state = {
            **plan.model_dump(mode="json", include={"sizes", "seeds", "tuning_seeds", "command"}),
            "arms": [arm.label for arm in plan.arms],
            "rates_tuned": all(stages.settled.bracketed for stages in self._points),
            "points": points,
            "controller": points[0]["controller"],
            "settled": [stages.settled.model_dump(mode="json", exclude_unset=True) for stages in self._points],
            "trials": {name: self._state(name) for name in self._trials},
        }
        write_json(self._folder.out / STATE, state)
        self._parent.artifact(self._folder.out / STATE)

    def _state(self, name: str) -> dict[str, Any]:
        trial, error = self._trials[name], self._log.failures.get(name)
        told = {key: value for key, value in trial.tags().items() if key not in ("kind", "preset")}
        if self._log.summary(trial) is not None:
            return {**told, "status": "done", "error": None}
        return {**told, "status": "failed" if error else "missing", "error": error or "it has not been run to its end"}


def arm_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A row per arm: means over its seeds, and the loss's sample standard deviation where there are several."""
    runs: Any = pd.DataFrame(summaries).assign(grafts=lambda frame: frame["grafts"].map(len))
    by_arm, whole = runs.groupby("arm", sort=False), "{:,.0f}"
    styles = {"val_loss": "{:.4f}", "perplexity": "{:.2f}", "parameters": whole, "parameter_seconds": whole}
    styles |= {"tokens": whole, "grafts": "{:.1f}"} | ({"diverged": "{:.0%}"} if runs["diverged"].any() else {})
    table = pd.DataFrame({key: by_arm[key].mean().map(style.format) for key, style in styles.items()})
    table.insert(1, "± sd", [f"{sd:.4f}" if sd == sd else "" for sd in by_arm["val_loss"].std()])
    table.insert(0, "seeds", by_arm.size())
    return table.rename_axis(None).to_string()
