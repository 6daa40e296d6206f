"""Where a result comes from: the commit, the machine, and the versions that were used."""

import functools
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "ray", "mlflow", "numpy")


def provenance() -> dict[str, str]:
    """Tags of a run: `commit`, `hardware` (processor, usable cores, GPUs), `versions`."""
    versions = [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in PACKAGES)]
    return {"commit": commit(), "hardware": _hardware(), "versions": ", ".join(versions)}


@functools.cache
def commit() -> str:
    """This clone's commit, with `-dirty` where files differ; `unknown` outside a clone."""
    here = Path(__file__).resolve()
    tracked = ["ls-files", "--error-unmatch", here.name]  # an installed package may lie in a clone of something else
    try:
        for arguments in (tracked, ["describe", "--always", "--dirty", "--exclude=*"]):
            git = ["git", "-C", str(here.parent), *arguments]
            done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _hardware() -> str:
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", known, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{model[1] if model else platform.processor() or platform.machine()}, {cores} core(s)"]
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        parts += [cuda.get_device_name(i) for i in range(cuda.device_count())]
    return ", ".join(parts)
