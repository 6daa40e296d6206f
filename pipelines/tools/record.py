"""Ended runs as one benchmark, which `Esper/GrowthRecorded-v0` replays: controllers are compared without training."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.pipelines.common.arguments import command, flag
from esper.pipelines.common.ended_runs import EndedRun, ended_runs
from esper.platform.console import counted, say
from esper.platform.errors import UserError, in_a_sentence
from esper.platform.frozen import Frozen

# Keys that may differ: budget and start are an instance's, and the others decide no number of a run.
VARY = ("budget.amount", "budget.cooldowns", "host.n_layer", "host.layers", "data.source", "ppo.", "fleet.", "laws")


class RecordArguments(Frozen):
    """Gather ended runs, with what their controllers saw and chose, for Esper/GrowthRecorded-v0."""

    runs: Path = flag(..., "A folder with runs of `esper train` or `esper sweep`, in whatever depth.", positional=True)
    out: Path = flag(..., "A new or empty folder for the recording.", "DIR")


def run(arguments: RecordArguments) -> None:
    """Gather, write, and read it again as the environment does."""
    from esper.platform.storage import check_unused, new_folder
    from esper.workers.recorded import RecordedRun

    check_unused(arguments.out)
    found = list(ended_runs(arguments.runs))
    check_alike(found)
    with new_folder(arguments.out) as partial:
        write(found, partial)
        recorded = RecordedRun(partial)
    say(f"runs    {len(found)} of {counted(len(recorded.instances), 'instance')} (seed, budget and start)")
    say(f"wrote   {arguments.out}: gym.make('esper.workers.environment:Esper/GrowthRecorded-v0', data=…) plays it")


def check_alike(runs: Sequence[EndedRun]) -> None:
    """Raise UserError where text, weights to start with or specs differ, these in more than budget and start."""
    first = _numbers(runs[0])
    for run in runs[1:]:
        own = _numbers(run)
        if unlike := sorted(key for key in first.keys() | own.keys() if first.get(key) != own.get(key)):
            what = f"the runs in {runs[0].folder} and {run.folder} differ in {unlike[0]}"
            raise UserError(f"{what}, and may in seed, budget and start only: name others (not of --tune-lr).")


def write(runs: Sequence[EndedRun], out: Path) -> None:
    """Write a recording of runs that are alike."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from esper.platform.recording import DECISIONS, FILES, RUNS, SEEN_FILE, Manifest
    from esper.workers.observe import telemetry_space
    from esper.workers.tolaria.hosts import start_shape

    def instance(run: EndedRun) -> tuple[float, str, int]:
        start = json.dumps(start_shape(run.spec, vocab_size=1).layers_as_json())
        return run.summary["budget"]["amount"], start, run.summary["seed"]

    runs = sorted(runs, key=lambda run: (instance(run), run.summary["arm"]))
    number = {key: i for i, key in enumerate(sorted(set(map(instance, runs))))}
    rows, tables = [], []
    for i, run in enumerate(runs):
        with in_a_sentence(f"{run.folder} does not hold what its run saw", "run it again, or leave it out"):
            seen, curve = pq.read_table(run.folder / SEEN_FILE), run.summary["val_curve"]
            columns = {name: seen[name] for name in seen.column_names} | {
                "run": [i] * len(seen),
                "reward": [*run.summary["rewards"], None],
                **{name: [point[name] for point in curve] for name in ("val_loss", "budget_fraction")},
            }
            tables.append(pa.table({name: columns[name] for name in DECISIONS.names}, schema=DECISIONS))
        budget, start, _ = key = instance(run)
        own = {**run.summary, "run": i, "instance": number[key], "budget": budget, "start": start}
        rows.append({**{name: own[name] for name in RUNS.names}, "grafts": len(own["grafts"])})
    spec, space = runs[0].spec, telemetry_space(runs[0].spec)
    manifest = Manifest(
        spec=spec.overridden({"data.source": Path(spec.data.source).name, "budget.cooldowns": []}),
        sites=space.sites,
        candidates=space.candidates,
        text=runs[0].text,
        commits=tuple(sorted({run.pins["commit"] for run in runs})),
        torch=tuple(sorted({run.pins["torch"] for run in runs})),
        runs=len(rows),
        instances=len(number),
        decisions=sum(len(table) - 1 for table in tables),
    )
    manifest.write(out, dict(zip(FILES, (pa.concat_tables(tables), pa.Table.from_pylist(rows, RUNS)), strict=True)))


def _numbers(run: EndedRun) -> dict[str, Any]:
    """What decides a run's numbers, but for what an instance is, by dotted key."""
    files, inputs = run.pins["files"], run.pins["inputs"]
    found: dict[str, Any] = {"the text": run.text, "the weights to start with": files.get(inputs.get("model"))}

    def note(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                note(value, f"{prefix}{name}.")
            elif not f"{prefix}{name}".startswith(VARY):
                found[f"{prefix}{name}"] = value

    note(run.spec.model_dump(mode="json"), "")
    return found


main = command(run, RecordArguments, "esper record")

if __name__ == "__main__":
    sys.exit(main())
