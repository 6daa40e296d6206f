"""Write the report on a sweep from MLflow: `report.html`, `report.png`, `report.json`, also into the sweep's run."""

import re
import sys
from pathlib import Path

from esper.pipelines.common.arguments import command, flag
from esper.pipelines.reports.budgets import over_budgets
from esper.pipelines.reports.page import as_dict, html, short_tables
from esper.pipelines.reports.runs import Sweep, Tables, read_sweeps, tables
from esper.pipelines.reports.verdict import Verdict, judge
from esper.platform.console import say
from esper.platform.errors import reason, shown
from esper.platform.frozen import Frozen
from esper.platform.storage import check_unused, naming, write_json, write_text
from esper.platform.tracking import milliseconds

FILES = ("report.html", "report.png", "report.json")


class ReportArguments(Frozen):
    """Write the report on a sweep, from what MLflow holds."""

    experiment: str | None = flag(None, "MLflow's experiment (default: that of the newest sweep).", positional=True)
    sweep: str | None = flag(None, "The sweep's parent run (default: the newest of the experiment).", "RUN_ID|NAME")
    tracking_uri: str | None = flag(None, "MLflow's store (default: MLFLOW_TRACKING_URI, else mlflow.db here).", "URI")
    out: Path | None = flag(None, "A new or empty folder for the report (default: one in reports/).", "DIR")


def run(arguments: ReportArguments) -> None:
    """Read, judge, write, say."""
    [sweep] = read_sweeps(arguments.tracking_uri, arguments.experiment, arguments.sweep, newest=True)
    out = arguments.out or Path("reports") / re.sub(r"[^\w\-]", "_", sweep.name)
    check_unused(out)
    say(f"sweep   {sweep.name} of {sweep.experiment}, in {shown(sweep.client.tracking_uri)}")
    verdicts = write_report(sweep, out)
    for verdict in verdicts:
        if verdict.trials.title:
            print(f"{verdict.trials.title}:")
        for criterion in verdict.criteria:
            print(f"{criterion.criterion}: {criterion.outcome}. {criterion.sentence}")
            for why in criterion.withheld:
                print(f"  - {why}")
    print("\n".join(short_tables(verdicts)))
    say(f"results: {', '.join(str(out / name) for name in FILES)}")


def load(experiment: str, *, sweep: str | None = None, tracking_uri: str | None = None) -> Tables:
    """What an experiment's sweeps logged (or one, by run id or name), as pandas data frames, for notebooks.

    test = load("esper-tinystories").finals.query("purpose == 'test' and status == 'FINISHED' and not diverged")
    test.groupby("label")["val_loss"].agg(["mean", "std", "count"])
    """
    return tables(run for found in read_sweeps(tracking_uri, experiment, sweep) for run in found.runs)


def write_report(sweep: Sweep, out: Path) -> list[Verdict]:
    """Write the report on a sweep into `out`, over an older one there, and keep it with the sweep's run."""
    from esper.pipelines.reports.figures import save_picture  # matplotlib takes a second

    verdicts = [judge(sweep.runs, point, sweep.record) for point in sweep.record["points"]]
    overs = over_budgets(verdicts)
    out.mkdir(parents=True, exist_ok=True)
    with naming(out / "report.png"):
        drawn = overs or [verdict.trials for verdict in verdicts]
        save_picture(drawn, out / "report.png", "png")
    write_json(out / "report.json", as_dict(sweep, verdicts))
    write_text(out / "report.html", html(sweep, verdicts))
    try:
        for name in FILES:
            sweep.client.log_artifact(sweep.run_id, str(out / name), "report")
        if metrics := [metric for number, over in enumerate(overs) for metric in over.metrics(number)]:
            from mlflow.entities import Metric

            sweep.client.log_batch(sweep.run_id, [Metric(key, value, milliseconds(), at) for key, value, at in metrics])
    except Exception as error:  # the store may be read-only: the report itself is written
        say(f"note    MLflow did not take the report ({reason(error)}): it is only in {out}.")
    return verdicts


main = command(run, ReportArguments, "esper report")

if __name__ == "__main__":
    sys.exit(main())
