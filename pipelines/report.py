"""Write the report on a sweep: which arm reaches a lower loss at equal cost, and how sure that is. Reads only MLflow.

    python pipelines/report.py                                   # the newest sweep
    esper report esper-tinystories --sweep sweep-20260101-120000

Leaves `report.html` (one file, no network needed), `report.png` and `report.json` in the output folder, and keeps them
with the sweep's run in MLflow, under `report`. In a notebook: `load`.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from esper.pipelines.common.arguments import Arguments, Positional, main_guard
from esper.pipelines.reports.runs import Tables, tables
from esper.pipelines.reports.sections import Report
from esper.pipelines.reports.store import Sweep, asked, find_sweeps, newest_experiment, open_store, read_runs
from esper.pipelines.reports.verdict import judge
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.storage import check_unused, naming, write_json, write_text
from esper.platform.tracking_store import reason, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

FILES = ("report.html", "report.png", "report.json")


class ReportArguments(Arguments):
    """Write the report on a sweep, from what MLflow holds."""

    experiment: Positional[str | None] = Field(
        None, description="MLflow's experiment (default: that of the newest sweep)."
    )
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
    experiment = arguments.experiment or newest_experiment(client, store)
    sweep = next(find_sweeps(client, store, experiment, arguments.sweep))
    out = arguments.out or Path("reports") / re.sub(r"[^\w\-]", "_", sweep.name)
    check_unused(out)
    say(f"sweep   {sweep.name} of {sweep.experiment}, in {store}")
    report = build(client, sweep)
    save(client, report, out)
    for verdict in report.verdicts:
        if verdict.trials.title:
            print(f"{verdict.trials.title}:")
        for criterion in verdict.criteria:
            print(f"{criterion.criterion}: {criterion.outcome}. {criterion.sentence}")
            for why in criterion.withheld:
                print(f"  - {why}")
    say(f"results: {', '.join(str(out / name) for name in FILES)}")


def write_report(client: "MlflowClient", parent_run_id: str, out: Path) -> Path:
    """Write the report on one sweep into `out`, over an older one there; `report.html`'s path.

    Raises:
        UserError: the run has no `sweep.json`, or no finished trial.
    """
    store = shown(client.tracking_uri)
    experiment = asked(store, lambda: client.get_experiment(client.get_run(parent_run_id).info.experiment_id))
    return save(client, build(client, next(find_sweeps(client, store, experiment.name, parent_run_id))), out)


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

    Raises:
        UserError: the store, the experiment or the sweep is not there, or no trial has finished.
    """
    client, store = open_store(tracking_uri)
    runs, _ = read_runs(client, find_sweeps(client, store, experiment, sweep))
    return tables(runs)


def build(client: "MlflowClient", sweep: Sweep) -> Report:
    """Read a sweep's trials and judge each grid point.

    Raises:
        UserError: no trial has finished, or `sweep.json` is not what a sweep writes.
    """
    runs, notes = read_runs(client, [sweep])
    points = sweep.record.get("points")
    if not points or any("grid" not in point for point in points):
        raise UserError(f"sweep.json of {sweep.name!r} names no grid point: run `esper sweep` again.")
    if sweep.status == "RUNNING":
        notes.insert(0, "the sweep had not ended: this is what it had logged by then.")
    return Report(sweep, [judge(runs, point, sweep.record) for point in points], notes, runs)


def save(client: "MlflowClient", report: Report, out: Path) -> Path:
    """Write the files, and keep them with the sweep's run; `report.html`'s path."""
    from esper.pipelines.reports.figures import save_picture  # matplotlib takes a second
    from esper.pipelines.reports.html import html

    out.mkdir(parents=True, exist_ok=True)
    with naming(out / "report.png"):
        save_picture(f"{report.sweep.experiment} · {report.sweep.name}", report.verdicts, out / "report.png")
    write_json(out / "report.json", report.as_dict())
    write_text(out / "report.html", html(report))
    try:
        for name in FILES:
            client.log_artifact(report.sweep.run_id, str(out / name), "report")
    except Exception as error:  # the store may be read-only: the report itself is written
        say(f"note    MLflow did not take the report ({reason(error)}): it is only in {out}.")
    return out / "report.html"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, ReportArguments, "esper report", argv)


if __name__ == "__main__":
    sys.exit(main())
