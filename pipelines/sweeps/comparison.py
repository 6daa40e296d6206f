"""Running a sweep in its folder: what is missing, and no more; then the report."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from esper.pipelines.common.preset import resolve_spec
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.common.stopping import Stopped, stop_signals
from esper.pipelines.controllers.workers import gpus_needed
from esper.pipelines.report import write_report
from esper.pipelines.reports.runs import read_sweeps
from esper.pipelines.sweeps.arms import PPO
from esper.pipelines.sweeps.chart_view import curve_names, share_view
from esper.pipelines.sweeps.log import SUMMARY, TRIAL_SECONDS, SweepLog
from esper.pipelines.sweeps.plan import SweepArguments, SweepPlan
from esper.pipelines.sweeps.stages import Inputs, PointStages, Settled
from esper.pipelines.sweeps.tune import run_trials
from esper.platform import cluster
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.provenance import provenance
from esper.platform.storage import read_json, write_json
from esper.platform.tracking import SYNC_SECONDS, Tracker
from esper.policies.simic.policy import policy_file

STATE = "sweep.json"


def begin(arguments: SweepArguments, name: str = "sweep") -> int:
    """Settle what is asked for, run it, and report; returns 1 if a trial failed."""
    trains = arguments.policy is None and PPO in map(str.strip, arguments.arms.split(","))
    spec = resolve_spec(arguments, on="fleet" if trains and arguments.train_on == "text" else "here")
    plan = SweepPlan.settled(arguments, spec)
    folder = RunFolder.new(arguments, spec, name)
    files = {"policy": arguments.policy and policy_file(arguments.policy), "schedule": arguments.schedule}
    with folder.begin("sweep", plan.model_dump(mode="json"), files) as inputs:
        return compare(folder, plan, inputs)


def resume(out: Path) -> int:
    """Go on with the sweep in `out`. Raises UserError where there is none or its inputs have changed."""
    with RunFolder.reopen(out, "sweep") as folder:
        inputs, plan = folder.check(), SweepPlan.checked(folder.plan, f"the plan of {folder.out}")
        say(f"resume  {folder.out}")
        return compare(folder, plan, inputs)


def compare(folder: RunFolder, plan: SweepPlan, inputs: Inputs) -> int:
    """Run what is missing and report; returns 1 if a trial failed."""
    manifest, out = folder.tokens.manifest, folder.out
    data = f"{manifest.source}, {manifest.tokenizer}, {manifest.splits['train'].tokens:,} training tokens"
    how = f"stopped, with nothing lost; go on with: esper sweep --resume {out}"
    with (
        cluster.session(gpus=gpus_needed(folder.spec)),
        stop_signals(how) as check,  # after `ray.init`, which puts in a handler of its own, in C, that aborts
        folder.track({"kind": "sweep", "data": data, **provenance()}, system_metrics=True) as parent,
    ):
        sweep = Sweep(folder, plan, inputs, parent, check)
        try:
            sweep.run()
        except Stopped:
            parent.close("KILLED", TRIAL_SECONDS)
            raise
        summaries, failures = sweep.tell()
    say(f"results: {out / SUMMARY}")
    if parent.run_id is None:
        say(f"MLflow was not to be had: send it all, and get the report, with: esper sweep --resume {out}")
        return 1 if failures else 0
    try:
        write_report(read_sweeps(parent.uri, None, parent.run_id)[0], out / "report")
        say(f"report:  {out / 'report' / 'report.html'}")
    except UserError as error:
        say(f"no report: {error}")
    say(f"compare: {share_view(parent, folder.spec.budget.axis, summaries) or parent.where}")
    return 1 if failures else 0


class Sweep:
    """A sweep on the connected cluster; `check` is called often, and ends it by raising."""

    def __init__(
        self, folder: RunFolder, plan: SweepPlan, inputs: Inputs, parent: Tracker, check: Callable[[], None]
    ) -> None:
        self._folder, self._plan, self._parent = folder, plan, parent
        points, path = plan.points(folder.spec), folder.out / STATE
        curves = curve_names(point.row(arm) for point in points for arm in plan.arms)
        self._log = SweepLog(folder, parent, curves, check)
        settled: Any = [{} for _ in points]
        if path.exists():
            state = read_json(path, str(path), "the state of a sweep")
            settled = state.get("settled") if isinstance(state, dict) else None
        if not isinstance(settled, list) or len(settled) != len(points):
            raise UserError(f"{path} is not what this sweep wrote: restore it, or start the sweep anew.")
        self._points = [
            PointStages(folder, plan, point, Settled.checked(before, str(path)), inputs, self._log)
            for point, before in zip(points, settled, strict=True)
        ]

    def run(self) -> None:
        """Run everything that is missing, all grid points side by side, and send MLflow the rest."""
        out = self._folder.out
        self._parent.artifact(out / "spec.json")
        seconds, sent = TRIAL_SECONDS, False  # where the sweep is stopped
        try:
            for batches in zip_longest(*(point.batches() for point in self._points)):
                now = [batch for batch in batches if batch is not None]
                stage = "+".join(dict.fromkeys(stage for stage, _, _ in now))
                wanted = {trial: wanted for _, trials, wanted in now for trial in trials}
                if missing := self._log.begin(stage, wanted):
                    run_trials(stage, missing, self._folder, self._log)
                self._keep()
            seconds = SYNC_SECONDS
        finally:
            sent = self._log.close([stages.controller for stages in self._points], seconds)
            self._keep()
        if not sent:
            say(f"MLflow has not had everything: send the rest with: esper sweep --resume {out}")

    def tell(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Write and print the test runs' summaries; returns them, and each failed trial's reason by name."""
        tests = [trial for trial in self._log.trials.values() if trial.purpose == "test"]
        found = [(trial, self._log.summary(trial)) for trial in tests]
        summaries = [{**summary, "arm": trial.point.row(trial.arm)} for trial, summary in found if summary is not None]
        write_json(self._folder.out / SUMMARY, summaries)
        self._parent.artifact(self._folder.out / SUMMARY)
        if summaries:
            say(arm_table(summaries))
        failures = {name: error for name in self._log.trials if (error := self._state(name)["error"])}
        for name, why in failures.items():
            say(f"failed  {name}: {why}")
        return summaries, failures

    def _keep(self) -> None:
        """Write `sweep.json`: the report and a resumed sweep read it."""
        points = [
            {
                "grid": stages.point.grid,
                "budget": stages.point.spec.budget.model_dump(mode="json", include={"axis", "amount"}),
                "spec": stages.point.spec.model_dump(mode="json"),
                "spent": stages.spent(),
                **Settled.model_validate(stages.settled).model_dump(mode="json"),
            }
            for stages in self._points
        ]
        state = {
            **self._plan.model_dump(mode="json", include={"sizes", "seeds", "tuning_seeds", "command"}),
            "arms": [arm.label for arm in self._plan.arms],
            "rates_tuned": all(point["bracketed"] for point in points),
            "points": points,
            "controller": points[0]["controller"],
            "settled": [stages.settled for stages in self._points],
            "trials": {name: self._state(name) for name in self._log.trials},
        }
        write_json(self._folder.out / STATE, state)
        self._parent.artifact(self._folder.out / STATE)

    def _state(self, name: str) -> dict[str, Any]:
        trial, error = self._log.trials[name], self._log.failures.get(name)
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
