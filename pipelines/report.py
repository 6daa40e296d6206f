"""Write the report on a sweep: which arm reaches a lower loss at equal cost, and how sure that is.

Reads only MLflow; leaves `report.html`, `report.png` and `report.json` in a folder and with the sweep's run.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from esper.pipelines.common.arguments import Arguments, Positional, main_guard
from esper.pipelines.reports.page import Report, html
from esper.pipelines.reports.runs import Tables, tables
from esper.pipelines.reports.store import Sweep, find_sweeps, open_store, read_runs
from esper.pipelines.reports.verdict import judge
from esper.platform.console import say
from esper.platform.storage import check_unused, naming, write_json, write_text
from esper.platform.tracking_store import reason

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
    client = open_store(arguments.tracking_uri)
    sweep = next(find_sweeps(client, arguments.experiment, arguments.sweep))
    out = arguments.out or Path("reports") / re.sub(r"[^\w\-]", "_", sweep.name)
    check_unused(out)
    say(f"sweep   {sweep.name} of {sweep.experiment}, in {sweep.store}")
    for verdict in _write(client, sweep, out).verdicts:
        if verdict.trials.title:
            print(f"{verdict.trials.title}:")
        for criterion in verdict.criteria:
            print(f"{criterion.criterion}: {criterion.outcome}. {criterion.sentence}")
            for why in criterion.withheld:
                print(f"  - {why}")
    say(f"results: {', '.join(str(out / name) for name in FILES)}")


def write_report(client: "MlflowClient", parent_run_id: str, out: Path) -> None:
    """Write the report on one sweep into `out`, over an older one there."""
    _write(client, next(find_sweeps(client, None, parent_run_id)), out)


def load(experiment: str, *, sweep: str | None = None, tracking_uri: str | None = None) -> Tables:
    """What an experiment's sweeps logged (or one, by run id or name), as pandas data frames, for notebooks.

    test = load("esper-tinystories").finals.query("purpose == 'test' and status == 'FINISHED' and not diverged")
    test.groupby("label")["val_loss"].agg(["mean", "std", "count"])
    """
    client = open_store(tracking_uri)
    runs, _ = read_runs(client, find_sweeps(client, experiment, sweep))
    return tables(runs)


def _write(client: "MlflowClient", sweep: Sweep, out: Path) -> Report:
    from esper.pipelines.reports.figures import save_picture  # matplotlib takes a second

    runs, notes = read_runs(client, [sweep])
    if sweep.run.info.status == "RUNNING":
        notes.insert(0, "the sweep had not ended: this is what it had logged by then.")
    report = Report(sweep, [judge(runs, point, sweep.record) for point in sweep.record["points"]], notes, runs)
    out.mkdir(parents=True, exist_ok=True)
    with naming(out / "report.png"):
        save_picture(f"{sweep.experiment} · {sweep.name}", report.verdicts, out / "report.png")
    write_json(out / "report.json", report.as_dict())
    write_text(out / "report.html", html(report))
    try:
        for name in FILES:
            client.log_artifact(sweep.run.info.run_id, str(out / name), "report")
    except Exception as error:  # the store may be read-only: the report itself is written
        say(f"note    MLflow did not take the report ({reason(error)}): it is only in {out}.")
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, ReportArguments, "esper report", argv)


if __name__ == "__main__":
    sys.exit(main())
