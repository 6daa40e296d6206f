"""A sweep's trials under Ray Tune, which starts and restarts their processes: each is a whole episode.

`Tuner.restore` is not used: Tune notes ended trials only now and then, and would train some twice. Results lie in the
trial's folder (`log.py`), work under way in its newest checkpoint, saved at each decision.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune

from esper.pipelines.common.play import play, save, take_up
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.sweeps.log import SweepLog
from esper.pipelines.sweeps.plan import Trial
from esper.platform import cluster
from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction
from esper.platform.errors import UserError
from esper.platform.telemetry import Telemetry
from esper.policies.arms import make_policy
from esper.policies.recorder import Recorder
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import Data, open_data

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # `SweepLog` reports
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own journal is the record, MLflow has the curves
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the pipeline
    "TUNE_MAX_PENDING_TRIALS_PG": "4",  # a process takes seconds to start, and a trial minutes
}
SAMPLED = 200  # tokens that a test trial on text ends with writing, for the report
STARTS = 3  # of a trial whose process dies, before it counts as failed


def run_trials(stage: str, trials: Sequence[Trial], folder: RunFolder, log: SweepLog) -> None:
    """Run trials, whose results go to `log`. A failed trial ends no other."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)  # `SweepLog` tells of deaths
    fleet, by_name = folder.spec.fleet, {trial.name: trial for trial in trials}
    cluster.fit(fleet.cpus, fleet.gpus)
    text = {"data": folder.data, "fingerprint": folder.tokens.manifest.fingerprint()}
    trainable = tune.with_parameters(_trial, trials=by_name, saves=log.saves, **text)
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": fleet.cpus, "gpu": fleet.gpus}),
        param_space={"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(  # processes are reused: to start one and import torch takes seconds
            trial_name_creator=_name, trial_dirname_creator=_name, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=f"{stage}-{time.time_ns()}",
            storage_path=str(folder.out / "tune"),
            callbacks=[log],
            failure_config=tune.FailureConfig(max_failures=STARTS - 1),
            verbose=0,
            log_to_file=True,
        ),
    ).fit()


def _name(trial: Any) -> str:
    return trial.config["trial"]


def _trial(config: dict[str, Any], trials: dict[str, Trial], data: Path, fingerprint: str, saves: str) -> None:
    try:
        tokens = open_data(data, verify=False)
        if tokens.manifest.fingerprint() != fingerprint:
            raise UserError(f"the text in {data} has been changed since the sweep began: put it back, then resume")
        with CheckpointStore(saves) as store:
            _play(trials[config["trial"]], tokens, store)
    except UserError as error:  # another start would not help
        tune.report({"error": str(error)})


def _play(trial: Trial, tokens: Data, store: CheckpointStore) -> None:
    run, policy = GrowthRun(trial.spec, tokens), Recorder(make_policy(trial.arm.kind.plays, trial.inputs))
    take_up(run, policy, store.find(trial.name), trial.seed)
    tune.report({"curve": list(run.curve)})

    def on_decision(run: GrowthRun, telemetry: Telemetry, action: GraftAction) -> None:
        save(run, policy, store, trial.name)
        if trial.spec.clock.kind == "wall":
            store.flush()  # done again, a decision would end elsewhere: what the driver has heard of must be there
        decided = {"action": str(telemetry.actions[action.index]), "at": float(telemetry.get("budget_used"))}
        tune.report({"curve": list(run.curve), **decided, "unsaved": store.failed})

    summary = play(run, policy, arm=trial.arm.label, on_decision=on_decision)
    store.flush()
    if trial.purpose == "test" and (written := run.sample(SAMPLED)):
        summary["sample"] = written
    tune.report({"curve": list(run.curve), "summary": summary, "seen": policy.record(run.telemetry)})
