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
    packages = [f"{package} {version(package)}" for package in PACKAGES]
    versions = ", ".join([f"Python {platform.python_version()}", *packages])
    return {"commit": commit() or "unknown", "hardware": _hardware(), "versions": versions}


@functools.cache
def commit() -> str | None:
    """This clone's commit, with `-dirty` where files differ; None outside a clone."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed package may lie in a clone of something else
        head, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changes else head


def _hardware() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", known, re.MULTILINE)
    parts = [f"{model[1] if model else platform.processor() or platform.machine()}, {cores} core(s)"]
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        parts += [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    return ", ".join(parts)
