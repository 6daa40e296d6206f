"""`esper train` with no arguments, from its call to its first progress line: at home for the first time, and again."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import Row

ROOT = Path(__file__).resolve().parents[1]


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


def measure() -> list[Row]:
    """Rows: with nothing in the cache, which on a network includes fetching TinyStories; and with the text there."""
    what = "`esper train` to its first progress line"
    with tempfile.TemporaryDirectory() as home:
        return [(f"{what}, {when}", "≤ 8 s", f"{first_line(home):.1f} s") for when in ("the first time", "again")]
