"""The runs of `esper train` and `esper sweep` that have ended, in folders."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esper.platform.errors import UserError
from esper.platform.provenance import PINS, SPEC
from esper.platform.spec import RunSpec, load_spec
from esper.platform.storage import read_json

RATES = "-rate"  # in the names of a sweep's trials that look for a learning rate: most have a poor one


class EndedRun(NamedTuple):
    """A run in a folder."""

    spec: RunSpec
    text: str  # its fingerprint; empty where there is none
    summary: Mapping[str, Any]
    folder: Path
    pins: Mapping[str, Any]  # of the run, or of the sweep that it is a trial of


def ended_runs(folder: Path) -> Iterator[EndedRun]:
    """Those in a folder, in whatever depth, but for trials that look for a rate; a UserError where there is none."""
    none = True
    for path in sorted(folder.rglob("summary.json")):
        place = path.parent
        pins = next((each / PINS for each in (place, *place.parents[:2]) if (each / PINS).is_file()), None)
        if pins is None or not (place / SPEC).is_file() or (place.parent.name == "trials" and RATES in place.name):
            continue
        summary = read_json(path, str(path), "the summary of a run")
        if not isinstance(summary, dict) or "val_curve" not in summary:  # of a sweep, or a controller
            continue
        none, kept = False, read_json(pins, str(pins), "the pins of a run")
        yield EndedRun(load_spec(place / SPEC), kept.get("data") or "", summary, place, kept)
    if none:
        raise UserError(f"{folder} holds no ended run: name a folder of `esper train` or `esper sweep` that does.")
