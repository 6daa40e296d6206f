"""A sweep's trials under Ray Tune: one trial is one arm on one seed, a whole episode in the trial's own process.

The trial reports each decision to Tune; a callback in the driver sends it on to MLflow, so that one process writes to
the store, and prints what has been done and how long is left.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from esper.pipelines.job import Job
from esper.pipelines.play import metrics, play
from esper.platform import cluster
from esper.platform.console import Eta, say
from esper.platform.contracts import GraftAction, Transition
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Telemetry
from esper.platform.tracking import Tracker
from esper.policies.arms import ArmInputs, make_policy
from esper.workers.probe import ChargedProbe
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the callback below reports
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own journal is summary.json, MLflow's the curves
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the pipeline
}


def run_trials(
    job: Job, arms: list[str], seeds: list[int], inputs: ArmInputs, *, experiment: str, parent: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run every arm on every seed; (summaries, arm by arm, and a sentence for each trial that failed)."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    fleet = job.spec.fleet
    cluster.fit(fleet.cpus, fleet.gpus)
    trainable = tune.with_parameters(_trial, spec=job.spec, data=job.data, inputs=inputs)
    reporter = _Reporter(job.spec, len(arms) * len(seeds), experiment, parent)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": fleet.cpus, "gpu": fleet.gpus}),
        param_space={"seed": tune.grid_search(seeds), "arm": tune.grid_search(arms)},
        tune_config=tune.TuneConfig(trial_name_creator=_name, trial_dirname_creator=_name),
        run_config=tune.RunConfig(
            name="trials", storage_path=str(job.out), callbacks=[reporter], verbose=0, log_to_file=True
        ),
    )
    summaries, failures = [], []
    try:
        results = tuner.fit()
    finally:
        reporter.close_all()
    for result in results:
        config, summary = result.config or {}, (result.metrics or {}).get("summary")
        name = f"{config['arm']}-seed{config['seed']}"
        if result.error is not None or summary is None:
            text = str(result.error or "it ended without a summary").strip()
            failures.append(f"{name}: {text.splitlines()[-1]} (log in {result.path})")
        else:
            summaries.append({**summary, "mlflow": reporter.run_ids.get(name)})
    return sorted(summaries, key=lambda summary: (arms.index(summary["arm"]), summary["seed"])), failures


def _trial(config: dict[str, Any], spec: RunSpec, data: Path, inputs: ArmInputs) -> None:
    """One episode, reported to Tune decision by decision; the last report carries the summary."""
    arm, seed = config["arm"], config["seed"]
    run = GrowthRun(spec, TokenData.open(data, verify=False))

    def on_decision(run: GrowthRun, telemetry: Telemetry, action: GraftAction, transition: Transition) -> None:
        report = {"point": run.curve[-1], "action": str(telemetry.actions[action.index])}
        if transition.terminated:
            report["summary"] = {"arm": arm, **run.summary()}
        tune.report(report)

    run.reset(seed=seed)
    policy = make_policy(arm, replace(inputs, seed=seed))
    play(run, policy, arm=arm, probe=ChargedProbe(run), on_decision=on_decision)


def _name(trial: Trial) -> str:
    return f"{trial.config['arm']}-seed{trial.config['seed']}"


class _Reporter(tune.Callback):
    """Driver side: a child run in MLflow per trial, and a line per graft and per finished trial."""

    def __init__(self, spec: RunSpec, trials: int, experiment: str, parent: str | None) -> None:
        self._spec, self._experiment, self._parent, self._count = spec, experiment, parent, trials
        self._fractions: dict[str, float] = {}
        self._trackers: dict[str, Tracker] = {}
        self.run_ids: dict[str, str | None] = {}
        self._eta = Eta()
        self._shown = 0.0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open the trial's MLflow run."""
        name = _name(trial)
        self._trackers[name] = Tracker.start(
            self._experiment,
            name,
            tags={**trial.config, "preset": self._spec.preset},
            params=self._spec.model_dump(mode="json"),
            parent=self._parent,
        )

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Log the decision's point; say what has been reached, about every tenth of the sweep."""
        name, point = _name(trial), result["point"]
        self._trackers[name].log(metrics(point), point["steps"])
        self._fractions[name] = point["budget_fraction"]
        done = sum(self._fractions.values()) / self._count
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

    def close_all(self) -> None:
        """Close what is still open: the sweep was interrupted."""
        for tracker in self._trackers.values():
            tracker.close("KILLED")
        self._trackers.clear()

    def _close(self, trial: Trial, status: Any) -> None:
        name = _name(trial)
        self._fractions[name] = 1.0
        tracker = self._trackers.pop(name, None)
        if tracker is not None:
            self.run_ids[name] = tracker.run_id
            tracker.close(status)
