"""Where a result comes from: the commit, the machine, and the versions that were used."""

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "ray", "mlflow", "numpy")


def provenance() -> dict[str, str]:
    """Tags for a run: `commit`, `hardware` of this machine, and `versions`."""
    return {"commit": commit() or "unknown", "hardware": hardware(), "versions": versions()}


@functools.cache
def commit() -> str | None:
    """The commit of this clone, with `-dirty` where files differ from it; None where the code is in no clone."""
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


def hardware() -> str:
    """Processor, cores that this process may use, and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{_processor()}, {cores} core(s)"]
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        parts += [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    return ", ".join(parts)


def versions() -> str:
    """Of Python and of the packages that decide numbers."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
