"""What share of an episode is not training steps: validation, measuring, grafts, snapshots, saving."""

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

EPISODES = {  # name → spec
    "demo": load_spec("demo"),
    "tinystories-char at 1 million": load_spec("tinystories-char", ["budget.amount=1000000"]),
}


def share(spec: RunSpec) -> str:
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


def measure() -> list[Row]:
    """Rows: an episode each."""
    return [(f"episode that is not training steps: {name}", "≤ 8 %", share(spec)) for name, spec in EPISODES.items()]
