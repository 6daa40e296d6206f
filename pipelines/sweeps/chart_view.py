"""One link that opens a sweep in MLflow's own UI as a chart: validation loss against cost, a curve per arm.

MLflow keeps a saved view of the runs page as a tag of the experiment, `mlflow.sharedViewState.<id>`: an envelope
{name, createdAt, updatedAt, state}, where `state` is "deflate;" and the base64 of zlib-packed JSON. It is not
documented (read from the page's code in 3.17.2), so it is written only where the server's own pages know it.
"""

import base64
import json
import math
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.platform.tracking import Tracker, milliseconds
from esper.platform.tracking_store import PROBE_SECONDS, connect, is_server, shown, ui_command

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TAG = "mlflow.sharedViewState."
LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` opens
KNOWN = (TAG.encode(), b"saved-view envelope")  # in the code of pages that read such a tag
HEIGHT = 420  # of a chart, pixels
SETTLED = 0.1  # the share of the budget whose steep start does not set the scale
RUNS = 1000


@dataclass(frozen=True)
class ChartView:
    """A page of MLflow's UI.

    Attributes:
        url: the page.
        command: what has to be started first, where no server runs.
        clicks: what is left to do by hand, where that MLflow does not know saved views.
    """

    url: str
    command: str | None = None
    clicks: str | None = None

    def __str__(self) -> str:
        first = f"start `{self.command}`, then open " if self.command else ""
        return f"{first}{self.url}" + (f" ({self.clicks})" if self.clicks else "")


def share_view(run: Tracker, axis: str = "parameter_seconds") -> ChartView | None:
    """Save the chart of a sweep's test trials with its experiment; once more replaces it.

    The page shows `grid/val_loss` over `grid/<axis>` and `annealed/val_loss` over `annealed/<axis>`, the mean and the
    range over seeds by the tag `label` (and `grid`, where there are several). The scale of the loss is fitted to what
    has been logged by now.

    Args:
        run: the sweep's own; its children with the tag `purpose` = `test` are drawn.
        axis: the cost on the x axis.

    Returns:
        the page, or None where the run is not tracked, or the store does not answer.
    """
    if run.run_id is None or run.experiment_id is None:
        return None
    server = is_server(run.uri)
    base = shown(run.uri).rstrip("/") if server else LOCAL
    command = None if server else ui_command(run.uri)
    page = f"{base}/#/experiments/{run.experiment_id}/runs"
    try:
        if not knows_views(run.uri):
            return ChartView(page, command, f"choose the chart view, then in its gear X-axis, Metric, {axis}")
        _save(connect(run.uri), run.experiment_id, run.run_id, axis)
    except Exception:  # the store's; the link is a convenience
        return None
    return ChartView(f"{page}?viewStateShareKey={run.run_id}&compareRunsMode=CHART", command)


def _save(client: "MlflowClient", experiment_id: str, parent: str, axis: str) -> None:
    """Write the tag."""
    chosen = f"tags.`mlflow.parentRunId` = '{parent}' AND tags.purpose = 'test'"
    trials = client.search_runs([experiment_id], chosen, max_results=RUNS)
    several = len({trial.data.tags.get("grid") for trial in trials}) > 1
    state = _state(chosen, ("label", "grid") if several else ("label",), axis, _loss_range(client, trials))
    before = client.get_experiment(experiment_id).tags.get(TAG + parent)
    now = milliseconds()
    envelope = {
        "name": f"Sweep {parent[:8]}: loss against {axis}",
        "createdAt": json.loads(before)["createdAt"] if before else now,
        "updatedAt": now,
        "state": "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode(),
    }
    client.set_experiment_tag(experiment_id, TAG + parent, json.dumps(envelope))


def _state(chosen: str, groups: tuple[str, ...], axis: str, loss: tuple[float, float] | None) -> dict[str, Any]:
    """The runs page: which runs, how grouped, and its charts; what is left out keeps MLflow's own setting."""
    kinds = ("grid", "annealed")
    section = {"isReordered": True, "deleted": False, "isGenerated": False}
    others = ("Model metrics", *kinds, "System metrics")  # MLflow's own charts, one for each metric, lie there
    return {
        "searchFilter": chosen,
        # Not by date: MLflow then adds the parents, as a group of their own.
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": tag} for tag in groups],
        },
        "useGroupedValuesInCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [
            {"uuid": "sweep", "name": "Sweep", "display": True, "columns": 1, "cardHeight": HEIGHT, **section},
            *({"uuid": name, "name": name, "display": False, **section} for name in others),
        ],
        "compareRunCharts": [_chart(kind, axis, loss) for kind in kinds],
        "globalLineChartConfig": {"xAxisKey": "metric", "selectedXAxisMetricKey": axis, "lineSmoothness": 0},
    }


def _chart(kind: str, axis: str, loss: tuple[float, float] | None) -> dict[str, Any]:
    """A line chart whose x axis is a metric logged at the same steps."""
    return {
        "uuid": kind,
        "metricSectionId": "sweep",
        "type": "LINE",
        "metricKey": f"{kind}/val_loss",
        "selectedMetricKeys": [f"{kind}/val_loss"],
        "useGlobalXaxisKey": False,
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": f"{kind}/{axis}",
        "xAxisScaleType": "linear",
        "yAxisKey": "metric",
        "scaleType": "linear",
        "range": {"yMin": loss[0], "yMax": loss[1]} if loss else {},
        "useGlobalLineSmoothing": False,
        "lineSmoothness": 0,
        "runsCountToCompare": RUNS,
        "deleted": False,
        "isGenerated": False,
    }


def _loss_range(client: "MlflowClient", trials: "Sequence[Run]") -> tuple[float, float] | None:
    """From below the best loss to above the worst after the steep start; MLflow's own scale starts at 0."""
    groups = [trial for trial in trials if "grid/val_loss" in trial.data.metrics]
    one_each = {(trial.data.tags.get("label"), trial.data.tags.get("grid")): trial for trial in groups}
    curves = [client.get_metric_history(trial.info.run_id, "grid/val_loss") for trial in one_each.values()]
    losses = [point.value for curve in curves for point in curve if point.step >= SETTLED * max(p.step for p in curve)]
    losses += [trial.data.metrics["grid/val_loss"] for trial in one_each.values()]
    losses += [trial.data.metrics["val_loss"] for trial in trials if "val_loss" in trial.data.metrics]
    losses = [loss for loss in losses if math.isfinite(loss)]
    margin = 0.05 * (max(losses) - min(losses)) if losses else 0
    return (round(min(losses) - margin, 4), round(max(losses) + margin, 4)) if margin > 0 else None


def knows_views(uri: str) -> bool:
    """Whether a store's pages read such tags, as far as those that are installed here can tell."""
    import mlflow

    if is_server(uri):
        with urllib.request.urlopen(shown(uri).rstrip("/") + "/version", timeout=PROBE_SECONDS) as answer:
            version = answer.read().decode().strip()
        if version.split(".")[:2] != mlflow.__version__.split(".")[:2]:
            return False
    left = set(KNOWN)
    for script in (Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js").glob("*.js"):
        content = script.read_bytes()
        left -= {mark for mark in left if mark in content}
        if not left:
            return True
    return False
