"""Cost of a sweep beside its training: the same runs as Ray Tune trials and one after another here."""

import os
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from esper.pipelines import sweep
from esper.platform.cluster import cores
from esper.platform.contracts import GraftAction
from esper.platform.spec import DataSpec, load_spec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData, prepare

TRIALS = 8
SETTINGS = ("budget.cooldowns=[0.5]",)  # as many forks here as there


def bench_sweep() -> None:
    """Seconds of a sweep of static `demo` runs, against the same runs alone, shared out over the cores."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        shards = Path(folder) / "shards"
        prepare(DataSpec(source="python-docs", max_bytes=500_000), shards)
        run = GrowthRun(load_spec("demo", SETTINGS), TokenData.open(shards))
        begun = time.perf_counter()
        for seed in range(TRIALS):
            run.reset(seed=seed)
            while not run.ended:
                run.step(GraftAction(0, run.telemetry.sequence))
        ideal = (time.perf_counter() - begun) / min(TRIALS, cores())
        flags = ["--preset", "demo", "--data", str(shards), "--arms", "static", "--seeds", str(TRIALS)]
        begun = time.perf_counter()
        sweep.main([*flags, *(flag for value in SETTINGS for flag in ("--set", value)), "--out", f"{folder}/sweep"])
        taken = time.perf_counter() - begun
    print(f"  {TRIALS} trials on {cores()} cores: {taken:.1f} s, Ray's start, MLflow and the report included")
    print(f"  the runs alone, shared out: {ideal:.1f} s; {(taken - ideal) / TRIALS:.2f} s a trial beside them")
