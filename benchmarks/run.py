"""`make bench` (or `python benchmarks/run.py step start`): a Markdown table of speeds, their goals and the commit.

A benchmark is a function that returns its rows, in the file that `BENCHMARKS` names; `gpu.py` is for a GPU.
"""

import sys
import time
from importlib import import_module

import torch
from measuring import Row

from esper.platform.provenance import provenance

BENCHMARKS = {"step": "step", "growth": "step", "share": "train", "start": "train", "dispatch": "dispatch"}


def main(names: list[str]) -> None:
    """Print each row as soon as it is there."""
    torch.set_num_threads(1)
    told = provenance()
    print(f"{told['hardware']}, 1 thread, {told['versions']}, {time.strftime('%Y-%m-%d')}:\n")
    print("| what | goal | now | commit |\n|---|---|---|---|", flush=True)
    for name in names:
        rows: list[Row] = getattr(import_module(BENCHMARKS[name]), name)()
        for row in rows:
            print(f"| {' | '.join(row)} | {told['commit']} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(BENCHMARKS))
