"""Pins: hashes of what a run's numbers depend on, so that a resumed run goes on from the same.

A run's folder holds `spec.json` (resolved), `inputs/` (copies of named files) and `pins.json`.
"""

import functools
import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.provenance import commit
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_bytes, write_text

PINS, SPEC, INPUTS = "pins.json", "spec.json", "inputs"  # in a run's folder
CODE = ("platform", "workers", "policies")  # the folders that numbers depend on


class Pins(Frozen):
    """`pins.json`; digests are SHA-256 in hexadecimal."""

    files: dict[str, str]  # path in the run's folder → digest
    inputs: dict[str, str]  # name of an input → path in the run's folder
    data: str | None  # fingerprint of the text; None where there is none
    code: str
    torch: str
    commit: str


def pin(out: Path, spec: RunSpec, *, data: str | None, inputs: Mapping[str, Path]) -> dict[str, Path]:
    """Copy spec and inputs into the run's folder, `pins.json` last; returns the copies, which the run must read."""
    copies = {name: f"{INPUTS}/{name}{path.suffix}" for name, path in inputs.items()}
    contents = {copies[name]: _content(path, f"the {name} {path}") for name, path in inputs.items()}
    contents[SPEC] = (spec.model_dump_json(indent=2) + "\n").encode()
    for name, content in contents.items():
        write_bytes(out / name, content)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    machine = {"code": code_digest(), "torch": version("torch"), "commit": commit()}
    pins = Pins(files=files, inputs=copies, data=data, **machine)
    write_text(out / PINS, pins.model_dump_json(indent=2) + "\n")
    return {name: out / path for name, path in copies.items()}


def check_pins(out: Path, *, data: str | None) -> dict[str, Path]:
    """The copies of a run's inputs; raises UserError for the first thing that differs from its pins."""
    pins = Pins.checked(read_json(out / PINS, str(out / PINS), "the folder of a run that was begun"), str(out / PINS))
    for name, digest in pins.files.items():
        if hashlib.sha256(_content(out / name, str(out / name))).hexdigest() != digest:
            raise UserError(f"{out / name} was changed since the run began: restore it, or start the run anew.")
    if data != pins.data:
        was, found = str(pins.data)[:12], str(data)[:12]
        raise UserError(
            f"the text has changed since the run in {out} began (fingerprint {found} instead of {was}): give it the "
            "same text, or start the run anew."
        )
    begun = f"the run in {out} began with"
    if (found := version("torch")) != pins.torch:
        raise UserError(f"{begun} torch {pins.torch}, and this is {found}: install that, or start the run anew.")
    if code_digest() != pins.code:
        raise UserError(
            f"{begun} other code (commit {pins.commit}) than this (commit {commit()}), which may give other numbers: "
            "go on with that one, or start the run anew."
        )
    return {name: out / path for name, path in pins.inputs.items()}


@functools.cache
def code_digest() -> str:
    """SHA-256 of the sources that numbers depend on."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (root / folder).rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _content(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror}): it must be a file that is there.") from None
