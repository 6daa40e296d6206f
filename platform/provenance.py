"""Where a result comes from, and pins: hashes of what its numbers depend on, so that it is gone on with from the same.

A run's folder holds `spec.json` (resolved), `inputs/` (copies of named files) and `pins.json`.
"""

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from pydantic import Field

from esper.platform import plugins
from esper.platform.console import counted
from esper.platform.errors import UserError, in_a_sentence
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_bytes, write_text

PINS, SPEC, INPUTS = "pins.json", "spec.json", "inputs"  # in a run's folder
CODE = ("platform", "workers", "policies")  # the folders that numbers depend on
PACKAGES = ("torch", "ray", "mlflow", "numpy")


class Pins(Frozen):
    """`pins.json`; digests are SHA-256 in hexadecimal."""

    files: dict[str, str]  # path in the run's folder → digest
    inputs: dict[str, str]  # name of an input → path in the run's folder
    data: str | None  # fingerprint of the text; None where there is none
    code: str
    torch: str
    commit: str
    plugins: dict[str, str] = Field(default={})  # module → digest of its sources


def pin(
    out: Path, spec: RunSpec, *, data: str | None, inputs: Mapping[str, Path], arms: Iterable[str] = ()
) -> dict[str, Path]:
    """Copy spec and inputs into the run's folder, `pins.json` last; returns the copies, which the run must read.

    Of plug-ins, those of the spec and of these arms, the digests are kept, and no copies.
    """
    copies = {name: f"{INPUTS}/{name}{path.suffix}" for name, path in inputs.items()}
    contents = {copies[name]: _content(path, f"the {name} {path}") for name, path in inputs.items()}
    contents[SPEC] = (spec.model_dump_json(indent=2) + "\n").encode()
    for name, content in contents.items():
        write_bytes(out / name, content)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    used = {name: plugins.digest(name) for name in plugins.modules(spec.growth, arms)}
    now = {"data": data, "code": code_digest(), "torch": version("torch"), "commit": commit()}
    pins = Pins(files=files, inputs=copies, plugins=used, **now)
    write_text(out / PINS, pins.model_dump_json(indent=2) + "\n")
    return {name: out / path for name, path in copies.items()}


def check_pins(out: Path, *, data: str | None) -> dict[str, Path]:
    """The copies of a run's inputs; raises UserError for the first thing that differs from its pins."""
    pins = Pins.checked(read_json(out / PINS, str(out / PINS), "the folder of a run that was begun"), str(out / PINS))
    for name, digest in pins.files.items():
        if hashlib.sha256(_content(out / name, str(out / name))).hexdigest() != digest:
            raise UserError(f"{out / name} was changed since the run began: restore it, or start the run anew.")
    for what, was, found in (
        ("text", pins.data, data),
        ("torch", pins.torch, version("torch")),
        (f"code, of commit {pins.commit} (this is {commit()}),", pins.code, code_digest()),
        *((f"sources of {name}", was, plugins.digest(name)) for name, was in pins.plugins.items()),
    ):
        if found != was:
            other = f"with other {what} ({str(was)[:12]}) than there is now ({str(found)[:12]})"
            mend = "which may give other numbers: go on with that one, or start the run anew"
            raise UserError(f"the run in {out} began {other}, {mend}.")
    return {name: out / path for name, path in pins.inputs.items()}


@functools.cache
def code_digest() -> str:
    """SHA-256 of the sources that numbers depend on."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (root / folder).rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def provenance() -> dict[str, str]:
    """Tags of a run: `commit`, `hardware` (processor, usable cores, GPUs), `versions`."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = [f"{model[1] if model else platform.processor() or platform.machine()}, {counted(cores or 1, 'core')}"]
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        hardware += [cuda.get_device_name(i) for i in range(cuda.device_count())]
    versions = [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in PACKAGES)]
    return {"commit": commit(), "hardware": ", ".join(hardware), "versions": ", ".join(versions)}


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


def _content(path: Path, what: str) -> bytes:
    with in_a_sentence(f"{what} cannot be read", "it must be a file that is there"):
        return path.read_bytes()
