"""`esper policy fit`: loss laws from static and growing runs in folders, as the file that `planner` plays by."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from esper.platform.console import counted, say
from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.provenance import PINS, SPEC
from esper.platform.spec import RunSpec, load_spec
from esper.platform.storage import check_unused, read_json, write_text
from esper.workers.laws.fit import Annealed, annealed_losses, decision_losses, fit_laws, held_out_residual
from esper.workers.laws.forecast import ensemble
from esper.workers.laws.scaling_law import SIZE

if TYPE_CHECKING:
    from esper.pipelines.policy import FitArguments

RATES = "-rate"  # in the names of a sweep's trials that look for a learning rate: most have a poor one


class Found(NamedTuple):
    """A run in a folder."""

    spec: RunSpec
    text: str  # its fingerprint
    summary: Mapping[str, Any]
    losses: list[Annealed]  # none where it was unsound


def fit(arguments: "FitArguments") -> None:
    """Fit laws to the runs in a folder, and write and say what they are."""
    check_unused(arguments.out, file=True)
    found = list(runs_in(arguments.runs))
    for what, values in (
        ("preset", {run.spec.preset for run in found}),
        ("tokenizer", {run.spec.data.tokenizer for run in found}),
        ("text", {run.text for run in found}),
    ):
        if len(values) != 1:
            told = f"several: {', '.join(sorted(values))}" if values else "none"
            raise UserError(f"laws are of one {what}, and the runs in {arguments.runs} are of {told}: name others.")
    used, spec = [run for run in found if run.losses], found[0].spec
    losses = [run.losses for run in used]
    fitted, held_out = fit_laws(spec, losses), held_out_residual(spec, losses)
    laws = FittedLaws(
        preset=spec.preset,
        tokenizer=spec.data.tokenizer,
        host=spec.host.starting_with(1),
        text=found[0].text,
        runs=len(used),
        grown=sum(bool(run.summary["grafts"]) for run in used),
        losses=sum(map(len, losses)),
        command=" ".join(sys.argv),
        residual=fitted.residual,
        held_out=held_out,
        ensemble=ensemble(fitted.ensemble),
        **decision_losses(fitted.law, [(run.spec, run.summary) for run in used]),
    )
    write_text(arguments.out, laws.model_dump_json(indent=2) + "\n")
    say(
        f"runs    {len(used)}, {laws.grown} of which grew; {counted(len(found) - len(used), 'run')} left out as unsound"
    )
    say("law     " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(fitted.law).items()))
    say(f"misses  {laws.residual:.4f} nats (rms) over {laws.losses} annealed losses")
    if held_out is not None:
        say(f"        {held_out:.4f} over growing runs, each by a law fitted without those of its seed")
    say(f"wrote   {arguments.out}; play by it with: esper train planner --laws {arguments.out}")


def runs_in(folder: Path) -> Iterator[Found]:
    """The runs of `esper train` and `esper sweep` in a folder, in whatever depth; a UserError where there is none."""
    none = True
    for path in sorted(folder.rglob("summary.json")):
        place = path.parent
        pins = next((each / PINS for each in (place, *place.parents[:2]) if (each / PINS).is_file()), None)
        if pins is None or not (place / SPEC).is_file() or (place.parent.name == "trials" and RATES in place.name):
            continue
        summary = read_json(path, str(path), "the summary of a run")
        curve = summary.get("val_curve") if isinstance(summary, dict) else None
        if not curve or not curve[0].keys() >= set(SIZE):  # of a sweep, a controller, or an older Esper
            continue
        none, text = False, read_json(pins, str(pins), "the pins of a run").get("data")
        yield Found(load_spec(place / SPEC), text or "", summary, annealed_losses(summary))
    if none:
        raise UserError(f"{folder} holds no ended run: name a folder of `esper train` or `esper sweep` that does.")
