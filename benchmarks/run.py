"""`make bench` (or `python benchmarks/run.py step start`): a Markdown table of speeds, their goals and the commit.

A benchmark is a file here with `measure()`, which returns its rows; `gpu.py` is another script, for a GPU.
"""

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from measuring import Row

BENCHMARKS = ("step", "growth", "share", "start", "dispatch")


def hardware() -> str:
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "a processor")


def main(names: list[str]) -> None:
    """Print each row as soon as it is there."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    torch.set_num_threads(1)
    print(f"{hardware()}, 1 thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}:\n")
    print("| what | goal | now | commit |\n|---|---|---|---|", flush=True)
    for name in names:
        rows: list[Row] = import_module(name).measure()
        for row in rows:
            print(f"| {' | '.join(row)} | {commit} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(BENCHMARKS))
