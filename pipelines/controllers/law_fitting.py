"""`esper policy fit`: loss laws from static and growing runs in folders, as the file that `planner` plays by."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from esper.platform.console import counted, say
from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.provenance import PINS, SPEC
from esper.platform.spec import RunSpec, load_spec
from esper.platform.storage import check_unused, read_json, write_text
from esper.workers.laws.fit import Annealed, annealed_losses, decision_losses, fit_laws, held_out_residual
from esper.workers.laws.forecast import ensemble
from esper.workers.laws.scaling_law import SIZE, ScalingLaw

if TYPE_CHECKING:
    from esper.pipelines.policy import FitArguments

RATES = "-rate"  # in the names of a sweep's trials that look for a learning rate: most have a poor one


class Found(NamedTuple):
    """A run in a folder."""

    spec: RunSpec
    text: str  # its fingerprint
    summary: Mapping[str, Any]
    losses: list[Annealed]  # none where it was unsound

    @classmethod
    def of(cls, spec: Any, text: str, summary: Mapping[str, Any]) -> Self:
        """A run from its summary; `spec` may be its JSON values, as `kept` gives them."""
        return cls(RunSpec.model_validate(spec), text, summary, annealed_losses(summary))

    def kept(self) -> dict[str, Any]:
        """As JSON values, the arguments of `of`."""
        return {"spec": self.spec.model_dump(mode="json"), "text": self.text, "summary": self.summary}


def fit(arguments: "FitArguments") -> None:
    """Fit laws to the runs in a folder, and write and say what they are."""
    check_unused(arguments.out, file=True)
    found = list(runs_in(arguments.runs))
    laws, law = fitted(arguments.runs, found)
    held_out = held_out_residual(found[0].spec, [run.losses for run in found if run.losses])
    laws, unsound = laws.model_copy(update={"held_out": held_out}), len(found) - laws.runs
    write_text(arguments.out, laws.model_dump_json(indent=2) + "\n")
    say(f"runs    {laws.runs}, {laws.grown} of which grew; {counted(unsound, 'run')} left out as unsound")
    say("law     " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(law).items()))
    say(f"misses  {laws.residual:.4f} nats (rms) over {laws.losses} annealed losses")
    if laws.held_out is not None:
        say(f"        {laws.held_out:.4f} over growing runs, each by a law fitted without those of its seed")
    say(f"wrote   {arguments.out}; play by it with: esper train planner --laws {arguments.out}")


def fitted(folder: Path, found: Sequence[Found]) -> tuple[FittedLaws, ScalingLaw]:
    """Laws fitted to runs, and the middle one; UserError where they are of several presets, tokenizers or texts."""
    for what, values in (
        ("preset", {run.spec.preset for run in found}),
        ("tokenizer", {run.spec.data.encoding for run in found}),
        ("text", {run.text for run in found}),
    ):
        if len(values) != 1:
            told = f"several: {', '.join(sorted(values))}" if values else "none"
            raise UserError(f"laws are of one {what}, and the runs in {folder} are of {told}: name others.")
    used, spec = [run for run in found if run.losses], found[0].spec
    losses = [run.losses for run in used]
    made = fit_laws(spec, losses)
    laws = FittedLaws(
        preset=spec.preset,
        tokenizer=spec.data.encoding,
        host=spec.host.starting_with(1),
        text=found[0].text,
        folder=str(folder.absolute()),
        runs=len(used),
        grown=sum(bool(run.summary["grafts"]) for run in used),
        losses=sum(map(len, losses)),
        command=" ".join(sys.argv),
        residual=made.residual,
        ensemble=ensemble(made.ensemble),
        **decision_losses(made.law, [(run.spec, run.summary) for run in used]),
    )
    return laws, made.law


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
        yield Found.of(load_spec(place / SPEC), text or "", summary)
    if none:
        raise UserError(f"{folder} holds no ended run: name a folder of `esper train` or `esper sweep` that does.")
