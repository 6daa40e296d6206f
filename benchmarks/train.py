"""`esper train`: its start, and what share of its episode is not training steps (validation, grafts, saving, …)."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import Row, text

from esper.pipelines.common.play import play, save
from esper.platform.checkpoint import CheckpointStore
from esper.platform.spec import RunSpec, load_spec
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.run import GrowthRun
from esper.workers.tolaria.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
EPISODES = {  # name → spec
    "demo": load_spec("demo"),
    "tinystories-char at 1 million": load_spec("tinystories-char", ["budget.amount=1000000"]),
}


def not_training(spec: RunSpec) -> str:
    """Of an episode under Tamiyo that is saved at every decision, as `esper train` does; on a CPU."""
    run, policy, plain, training = GrowthRun(spec, text(spec)), TamiyoPolicy(), Trainer.step, 0.0
    run.reset(seed=1)  # what a process pays once

    def step(self: Trainer, rate: float) -> None:
        nonlocal training
        begun = time.perf_counter()
        plain(self, rate)
        training += time.perf_counter() - begun

    Trainer.step = step
    with tempfile.TemporaryDirectory() as folder, CheckpointStore(Path(folder)) as checkpoints:
        begun = time.perf_counter()
        run.reset(seed=0)
        summary = play(run, policy, arm="tamiyo", on_decision=lambda *_: save(run, policy, checkpoints, "run"))
        checkpoints.flush()
        whole = time.perf_counter() - begun
    Trainer.step = plain
    return f"{1 - training / whole:.1%} (validation {summary['validation_seconds'] / whole:.1%}) of {whole:.1f} s"


def share() -> list[Row]:
    """Rows: an episode each."""
    what = "episode that is not training steps"
    return [(f"{what}: {name}", "≤ 8 %", not_training(spec)) for name, spec in EPISODES.items()]


def first_line(home: str) -> float:
    """Seconds."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HOME": home, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        for name in ("ESPER_CACHE", "XDG_CACHE_HOME", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        begun, command = time.perf_counter(), [sys.executable, str(ROOT / "pipelines" / "train.py")]
        running = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert running.stderr is not None
            if not any("% of budget" in line for line in running.stderr):
                raise RuntimeError(f"esper train ended with {running.wait()}, and no progress line")
            return time.perf_counter() - begun
        finally:
            running.kill()
            running.communicate()


def start() -> list[Row]:
    """Rows: with nothing in the cache, which on a network includes fetching TinyStories; and with the text there."""
    what = "`esper train` to its first progress line"
    with tempfile.TemporaryDirectory() as home:
        return [(f"{what}, {when}", "≤ 8 s", f"{first_line(home):.1f} s") for when in ("the first time", "again")]
