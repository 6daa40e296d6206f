"""Write the report on a sweep: which arm reaches a lower loss at equal cost, and how sure that is. Reads only MLflow.

    python pipelines/report.py                                   # the newest sweep of esper-tinystories
    esper report esper-tinystories --sweep sweep-20260101-120000
    esper report --tracking-uri http://mlflow:5000 --out reports/mine

Leaves `report.html` (one file, no network needed), `report.md` with `report.png`, and `report.json` in the output
folder, and keeps them with the sweep's run in MLflow, under `report`. In a notebook: `load`.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from esper.pipelines.common.arguments import Arguments, Positional, main_guard
from esper.pipelines.reports.content import Report, Section
from esper.pipelines.reports.figures import save_picture
from esper.pipelines.reports.markdown import markdown
from esper.pipelines.reports.page import page
from esper.pipelines.reports.store import (
    Skipped,
    Sweep,
    asked,
    find_experiment,
    find_sweep,
    open_store,
    read_tables,
    search,
)
from esper.pipelines.reports.tables import Tables
from esper.pipelines.reports.verdict import judge
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.storage import check_unused, naming, write_json, write_text
from esper.platform.tracking_store import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

FILES = ("report.html", "report.md", "report.png", "report.json")
KEPT_UNDER = "report"  # artifact folder of the parent run


class ReportArguments(Arguments):
    """Write the report on a sweep, from what MLflow holds."""

    experiment: Positional[str] = Field("esper-tinystories", description="MLflow's experiment.")
    sweep: Annotated[
        str | None,
        Field(title="RUN_ID|NAME", description="The sweep's parent run (default: the newest of the experiment)."),
    ] = None
    tracking_uri: Annotated[
        str | None,
        Field(title="URI", description="MLflow's store (default: MLFLOW_TRACKING_URI, else mlflow.db here)."),
    ] = None
    out: Annotated[
        Path | None, Field(title="DIR", description="A new or empty folder for the report (default: one in reports/).")
    ] = None


def run(arguments: ReportArguments) -> None:
    """Read, judge, write, say."""
    if arguments.out is not None:
        check_unused(arguments.out)
    client, store = open_store(arguments.tracking_uri)
    with asked(store):
        experiment_id = find_experiment(client, arguments.experiment, store)
        sweep = find_sweep(client, experiment_id, arguments.experiment, arguments.sweep)
    out = arguments.out or Path("reports") / re.sub(r"[^\w\-]", "_", sweep.name)
    check_unused(out)
    say(f"sweep   {sweep.name} of {arguments.experiment}, in {store}")
    report = build(client, store, experiment_id, arguments.experiment, sweep)
    for note in report.notes:
        say(f"note    {note}")
    save(client, report, out)
    for section in report.sections:
        if len(report.sections) > 1:
            print(f"{section.title}:")
        for criterion in section.verdict.criteria:
            print(f"{criterion.criterion}: {criterion.outcome}. {criterion.sentence}")
            for reason in criterion.withheld:
                print(f"  - {reason}")
    say(f"results: {', '.join(str(out / name) for name in FILES)}")


def write_report(client: "MlflowClient", parent_run_id: str, out: Path) -> Path:
    """Write the report on one sweep into `out`, over an older one there, and keep it with the sweep's run.

    Args:
        client: of the store that holds the sweep.
        parent_run_id: the sweep's run.
        out: folder; made where it is missing.

    Returns:
        `report.html`'s path.

    Raises:
        UserError: the run has no `sweep.json`, or no finished trial.
    """
    with asked(shown(client.tracking_uri)):
        run = client.get_run(parent_run_id)
        experiment = client.get_experiment(run.info.experiment_id)
        sweep = find_sweep(client, experiment.experiment_id, experiment.name, parent_run_id)
    report = build(client, shown(client.tracking_uri), experiment.experiment_id, experiment.name, sweep)
    return save(client, report, out)


def load(experiment: str, *, sweep: str | None = None, tracking_uri: str | None = None) -> Tables:
    """What an experiment's sweeps logged, as pandas data frames, for notebooks.

        from esper.pipelines.report import load

        tables = load("esper-tinystories")
        test = tables.finals.query("purpose == 'test' and status == 'FINISHED' and not diverged")
        test.groupby("label")["val_loss"].agg(["mean", "std", "count"])

    Args:
        experiment: MLflow's name of it.
        sweep: run id or name of one sweep; None for all, told apart by `finals["sweep"]`.
        tracking_uri: None for `MLFLOW_TRACKING_URI`, else `mlflow.db` in the working directory.

    Returns:
        `curves`, `finals` and `timeline` (`Tables` says what is in them). Runs that no sweep logged are left out, and
        how many is said on standard error.

    Raises:
        UserError: the store, the experiment or the sweep is not there, or no trial has finished.
    """
    client, store = open_store(tracking_uri)
    with asked(store):
        experiment_id = find_experiment(client, experiment, store)
        if sweep is not None:
            parents = [find_sweep(client, experiment_id, experiment, sweep).run_id]
        else:
            parents = [run.info.run_id for run in search(client, experiment_id, "tags.kind = 'sweep'")]
            if not parents:
                find_sweep(client, experiment_id, experiment, None)  # says what to do
        tables, skipped = read_tables(client, experiment_id, parents)
    _check_finished(tables, f"experiment {experiment!r}")
    for note in _notes(skipped):
        say(f"note    {note}")
    return tables


# -- Steps -------------------------------------------------------------------------------------------------------------


def build(client: "MlflowClient", store: str, experiment_id: str, experiment: str, sweep: Sweep) -> Report:
    """Read a sweep's trials and judge each grid point.

    Raises:
        UserError: no trial has finished, or `sweep.json` is not what a sweep writes.
    """
    with asked(store):
        tables, skipped = read_tables(client, experiment_id, [sweep.run_id])
    _check_finished(tables, f"sweep {sweep.name!r}")
    record = sweep.record or {}
    points = record.get("points")
    if not points or any("grid" not in point for point in points):
        raise UserError(f"sweep.json of {sweep.name!r} names no grid point: run `esper sweep` again.")
    sections = []
    for point in points:
        own = _at(tables, point["grid"])
        sections.append(Section(point, judge(own, point, sweep=record), own))
    notes = _notes(skipped)
    if sweep.status == "RUNNING":
        notes.insert(0, "the sweep had not ended: this is what it had logged by then.")
    return Report(sweep, experiment, store, sections, notes, tables.finals)


def save(client: "MlflowClient", report: Report, out: Path) -> Path:
    """Write the four files, and keep them with the sweep's run; `report.html`'s path."""
    out.mkdir(parents=True, exist_ok=True)
    with naming(out / "report.png"):
        save_picture(report, out / "report.png")
    write_text(out / "report.md", markdown(report, "report.png"))
    write_json(out / "report.json", report.as_dict())
    write_text(out / "report.html", page(report))
    try:
        for name in FILES:
            client.log_artifact(report.sweep.run_id, str(out / name), KEPT_UNDER)
    except Exception as error:  # the store may be read-only: the report itself is written
        say(f"note    MLflow did not take the report ({str(error).splitlines()[0][:200]}): it is only in {out}.")
    return out / "report.html"


def _at(tables: Tables, grid: str) -> Tables:
    """One grid point's rows."""
    own: dict[str, Any] = {
        name: frame[frame["grid"] == grid].reset_index(drop=True) for name, frame in vars(tables).items()
    }
    return Tables(**own)


def _check_finished(tables: Tables, what: str) -> None:
    if "FINISHED" not in set(tables.finals["status"]):
        raise UserError(f"{what} has no finished runs: wait for its trials, or go on with it (`esper sweep --resume`).")


def _notes(skipped: Skipped) -> list[str]:
    return [f"{count} run(s) were skipped: {reason}." for reason, count in skipped.items()]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, ReportArguments, "esper report", argv)


if __name__ == "__main__":
    sys.exit(main())
