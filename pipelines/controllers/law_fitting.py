"""`esper policy fit`: loss laws from static and growing runs in folders, as the file that `planner` plays by."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from esper.pipelines.common.ended_runs import ended_runs
from esper.platform.console import counted, say
from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.spec import RunSpec
from esper.platform.storage import check_unused, write_text
from esper.workers.laws.fit import Annealed, annealed_losses, decision_losses, fit_laws, held_out_residual
from esper.workers.laws.forecast import ensemble
from esper.workers.laws.scaling_law import ScalingLaw

if TYPE_CHECKING:
    from esper.pipelines.policy import FitArguments


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
    """The runs of `esper train` and `esper sweep` in a folder; a UserError where there is none."""
    for run in ended_runs(folder):
        yield Found.of(run.spec, run.text, run.summary)
