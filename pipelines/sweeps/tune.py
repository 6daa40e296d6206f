"""A sweep's trials under Ray Tune: each is a whole episode in a process of its own.

A trial saves its run at each decision and reports the points of its curve; `log.py` takes them in the driver. One that
dies is started again by Tune and goes on from its save, so does one whose sweep is resumed: what has been done is in
the trial's folder and its save, not in Tune's own files.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune

from esper.pipelines.common.play import play
from esper.pipelines.sweeps.log import SweepLog
from esper.pipelines.sweeps.trial import Trial
from esper.platform import cluster
from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction, Stateful, Transition
from esper.platform.errors import UserError
from esper.platform.spec import FleetSpec
from esper.platform.telemetry import Telemetry
from esper.policies.arms import make_policy
from esper.workers.probe import ChargedProbe
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # `SweepLog` reports
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own journal is the record, MLflow has the curves
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the pipeline
    "TUNE_MAX_PENDING_TRIALS_PG": "4",  # a process takes seconds to start, and a trial minutes
}
STARTS = 3  # of a trial whose process dies, before it counts as failed


def run_trials(trials: Sequence[Trial], data: Path, log: SweepLog, *, fleet: FleetSpec, storage: str) -> None:
    """Run trials, whose results go to `log`; one that fails ends no other.

    Args:
        trials: to run, each with a name of its own.
        data: folder of the prepared shards.
        log: of the sweep.
        fleet: what a trial takes of the cluster.
        storage: place of the saves, which every node sees.
    """
    if not trials:
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)  # `SweepLog` tells of deaths
    cluster.fit(fleet.cpus, fleet.gpus)
    by_name = {trial.name: trial for trial in trials}
    trainable = tune.with_parameters(_trial, trials=by_name, data=data, storage=storage)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": fleet.cpus, "gpu": fleet.gpus}),
        param_space={"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            reuse_actors=True,  # to start a process and import torch takes seconds
        ),
        run_config=tune.RunConfig(
            name=log.next_stage(),
            storage_path=str(log.out / "tune"),
            callbacks=[log],
            failure_config=tune.FailureConfig(max_failures=STARTS - 1),
            verbose=0,
            log_to_file=True,
        ),
    )
    tuner.fit()


def _name(trial: Any) -> str:
    return trial.config["trial"]


def _trial(config: dict[str, Any], trials: dict[str, Trial], data: Path, storage: str) -> None:
    """One episode, reported to Tune decision by decision; the last report carries the summary."""
    try:
        _play(trials[config["trial"]], data, storage)
    except UserError as error:  # another start would not help
        tune.report({"error": str(error)})


def _play(trial: Trial, data: Path, storage: str) -> None:
    run = GrowthRun(trial.spec, TokenData.open(data, verify=False))
    policy = make_policy(trial.arm, trial.inputs)
    saves = CheckpointStore(storage)
    found = saves.find(trial.name)
    if found is not None and found[0]["books"]["spec"] == trial.spec.model_dump(mode="json"):
        values, tensors = found
        run.load(values, tensors)
        if isinstance(policy, Stateful):
            policy.resume(values["policy"])
    else:
        saves.drop(trial.name)  # another version's, or damaged
        run.reset(seed=trial.seed)
    tune.report({"points": run.curve})  # the driver knows those it has had before its own death

    def on_decision(run: GrowthRun, telemetry: Telemetry, action: GraftAction, transition: Transition) -> None:
        values, tensors = run.state()
        values["policy"] = policy.state() if isinstance(policy, Stateful) else None
        saves.save(trial.name, values, tensors)
        if trial.spec.clock.kind == "wall":
            saves.flush()  # done again, a decision would end elsewhere: what the driver has heard of must be there
        decided = {"action": str(telemetry.actions[action.index]), "at": float(telemetry.get("budget_used"))}
        tune.report({"points": run.curve[-1:], **decided, "unsaved": saves.failed})

    summary = play(run, policy, arm=trial.entrant.label, probe=ChargedProbe(run), on_decision=on_decision)
    saves.flush()
    tune.report({"points": [], "summary": summary})
