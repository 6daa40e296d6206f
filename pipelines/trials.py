"""A sweep's trials under Ray Tune: one trial is one arm on one seed, a whole episode in the trial's own process.

The trial reports each decision to Tune; a callback in the driver sends it on to MLflow, so that one process writes to
the store, and prints what has been done and how long is left.
"""

import os
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from esper.pipelines.job import Job
from esper.pipelines.play import metrics, play
from esper.platform.console import Eta, say
from esper.platform.spec import RunSpec
from esper.platform.tracking import Tracker
from esper.policies.arms import ArmInputs, make_policy
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the callback below reports
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own journal is summary.json, MLflow's the curves
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the pipeline
}


@dataclass(frozen=True)
class TrialPlan:
    """One trial."""

    arm: str
    inputs: ArmInputs

    @property
    def name(self) -> str:
        """As logs and MLflow call it."""
        return f"{self.arm}-seed{self.inputs.seed}"


def run_trials(
    job: Job, plans: list[TrialPlan], *, experiment: str, parent: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run every plan; (summaries in the plans' order, a sentence for each that failed)."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    fleet = job.spec.fleet
    trainable = tune.with_resources(
        tune.with_parameters(_trial, spec=job.spec, data_path=str(job.data)), {"cpu": fleet.cpus, "gpu": fleet.gpus}
    )
    reporter = _Reporter(job.spec, plans, experiment, parent)
    tuner = tune.Tuner(
        trainable,
        param_space={"plan": tune.grid_search(plans)},
        tune_config=tune.TuneConfig(trial_name_creator=_trial_name, trial_dirname_creator=_trial_name),
        run_config=tune.RunConfig(
            name="trials", storage_path=str(job.out), callbacks=[reporter], verbose=0, log_to_file=True
        ),
    )
    results = tuner.fit()
    summaries: dict[TrialPlan, dict[str, Any]] = {}
    failures = []
    for result in results:
        plan: TrialPlan = result.config["plan"]  # pyright: ignore[reportOptionalSubscript]
        summary = (result.metrics or {}).get("summary")
        if result.error is not None or summary is None:
            text = str(result.error or "it ended without a summary").strip()
            failures.append(f"{plan.name}: {text.splitlines()[-1]} (log in {result.path})")
        else:
            summaries[plan] = {**summary, "mlflow": reporter.run_ids.get(plan.name)}
    return [summaries[plan] for plan in plans if plan in summaries], failures


def _trial(config: dict[str, Any], spec: RunSpec, data_path: str) -> None:
    """One episode, reported to Tune decision by decision; the last report carries the summary."""
    from pathlib import Path

    plan: TrialPlan = config["plan"]
    run = GrowthRun(spec, TokenData.open(Path(data_path), verify=False))

    def on_decision(run, telemetry, action, transition) -> None:
        report = {"point": run.curve[-1], "action": str(telemetry.actions[action.index])}
        if transition.terminated:
            report["summary"] = {"arm": plan.arm, **run.summary()}
        tune.report(report)

    play(run, make_policy(plan.arm, plan.inputs), arm=plan.arm, seed=plan.inputs.seed, on_decision=on_decision)


def _trial_name(trial: Trial) -> str:
    return trial.config["plan"].name


class _Reporter(tune.Callback):
    """Driver side: a child run in MLflow per trial, and a line per graft and per finished trial."""

    def __init__(self, spec: RunSpec, plans: list[TrialPlan], experiment: str, parent: str | None) -> None:
        self._spec, self._experiment, self._parent = spec, experiment, parent
        self._fractions = {plan.name: 0.0 for plan in plans}
        self._trackers: dict[str, Tracker] = {}
        self.run_ids: dict[str, str | None] = {}
        self._eta = Eta()
        self._shown = 0.0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open the trial's MLflow run."""
        plan: TrialPlan = trial.config["plan"]
        self._trackers[plan.name] = Tracker.start(
            self._experiment,
            plan.name,
            tags={"arm": plan.arm, "seed": plan.inputs.seed, "preset": self._spec.preset},
            params=self._spec.model_dump(mode="json"),
            parent=self._parent,
        )

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Log the decision's point; say what has been reached, about every tenth of the sweep."""
        name, point = trial.config["plan"].name, result["point"]
        self._trackers[name].log(metrics(point), point["steps"])
        self._fractions[name] = point["budget_fraction"]
        done = sum(self._fractions.values()) / len(self._fractions)
        if result["action"] != "wait":
            say(f"  {name}: {result['action']} at {point['budget_fraction']:.0%}, {point['parameters']:,} parameters")
        if done - self._shown >= 0.1:
            self._shown = done
            say(f"  {done:.0%} of the sweep, {name} at loss {point['val_loss']:.3f}, {self._eta.left(done)} left")
        if "summary" in result:
            say(f"  {name} done: val loss {point['val_loss']:.4f}, {point['parameters']:,} parameters")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close its run."""
        self._close(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close its run as failed."""
        self._close(trial, "FAILED")

    def _close(self, trial: Trial, status: Any) -> None:
        name = trial.config["plan"].name
        self._fractions[name] = 1.0
        tracker = self._trackers.pop(name, None)
        if tracker is not None:
            self.run_ids[name] = tracker.run_id
            tracker.close(status)
