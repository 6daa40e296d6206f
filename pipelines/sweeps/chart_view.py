"""One link that opens a sweep in MLflow's own UI as a chart: validation loss against cost, a curve per arm.

MLflow keeps a saved view as a tag of the experiment: JSON whose `state` is "deflate;" and base64 of zlib-packed JSON.
The format is undocumented, so views are written only for the versions that were tested.
"""

import base64
import json
import math
import urllib.request
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from esper.platform.tracking import Tracker, milliseconds
from esper.platform.tracking_store import PROBE_SECONDS, connect, is_server, shown, ui_command

TESTED = "3.17."  # MLflow's versions
TAG = "mlflow.sharedViewState."
CURVE = "curve"  # the trials' tag that the chart groups by
COLORS = 29  # in MLflow's palette, from which a hash of a group's name picks
LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` opens
HEIGHT = 420  # of a chart, pixels
SETTLED = 0.1  # the share of the budget whose steep start does not set the scale
RUNS = 1000


def share_view(run: Tracker, axis: str, summaries: Iterable[Mapping[str, Any]]) -> str | None:
    """Save or replace the chart of a sweep's test trials; returns how to open it, None where MLflow does not answer."""
    if run.run_id is None or run.experiment_id is None:
        return None
    server = is_server(run.uri)
    page = f"{shown(run.uri).rstrip('/') if server else LOCAL}/#/experiments/{run.experiment_id}/runs"
    first = "" if server else f"start `{ui_command(run.uri)}`, then open "
    try:
        if not _version(run.uri).startswith(TESTED):
            return f"{first}{page} (choose the chart view, then in its gear X-axis, Metric, {axis})"
        client, tag = connect(run.uri), TAG + run.run_id
        before, now = client.get_experiment(run.experiment_id).tags.get(tag), milliseconds()
        state = zlib.compress(json.dumps(_state(run.run_id, axis, _loss_range(summaries))).encode())
        envelope = {
            "name": f"Sweep {run.run_id[:8]}: loss against {axis}",
            "createdAt": json.loads(before)["createdAt"] if before else now,
            "updatedAt": now,
            "state": "deflate;" + base64.b64encode(state).decode(),
        }
        client.set_experiment_tag(run.experiment_id, tag, json.dumps(envelope))
    except Exception:  # the store's; the link is a convenience
        return None
    return f"{first}{page}?viewStateShareKey={run.run_id}&compareRunsMode=CHART"


def curve_names(rows: Iterable[str]) -> dict[str, str]:
    """Each row, padded with spaces until MLflow's pages give it a colour of its own, while there are any left."""
    taken: set[int] = set()
    found = {}
    for row in rows:
        padded = (row + " " * spaces for spaces in range(10 * COLORS))
        found[row] = next((name for name in padded if _color(name) not in taken), row)
        taken.add(_color(found[row]))
    return found


def _color(name: str) -> int:
    """The page's hash of a group's name (Fletcher's checksum), as a number in the palette."""
    low = high = 0
    for character in f"tag.{CURVE}.{name}":
        low = (low + ord(character)) % 255
        high = (high + low) % 255
    return (low | high << 8) % COLORS


def _version(uri: str) -> str:
    import mlflow

    if not is_server(uri):
        return mlflow.__version__
    with urllib.request.urlopen(shown(uri).rstrip("/") + "/version", timeout=PROBE_SECONDS) as answer:
        return answer.read().decode().strip()


def _state(parent: str, axis: str, loss: tuple[float, float] | None) -> dict[str, Any]:
    """The runs page's state; what is left out keeps MLflow's own setting."""
    kinds = ("grid", "annealed")
    section = {"isReordered": True, "deleted": False, "isGenerated": False}
    others = ("Model metrics", *kinds, "System metrics")  # MLflow's own charts, one for each metric, lie there
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}' AND tags.purpose = 'test'",
        # Not by date: MLflow then adds the parents, as a group of their own.
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": CURVE}]},
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
    return {
        "uuid": kind,
        "metricSectionId": "sweep",
        "type": "LINE",
        "metricKey": f"{kind}/val_loss",
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


def _loss_range(summaries: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """From below the best loss to above the worst after the steep start; MLflow's own scale starts at 0."""
    points = [point for summary in summaries for point in summary["val_curve"] if point["budget_fraction"] >= SETTLED]
    losses = [point["val_loss"] for point in points if math.isfinite(point["val_loss"])]
    margin = 0.05 * (max(losses) - min(losses)) if losses else 0
    return (round(min(losses) - margin, 4), round(max(losses) + margin, 4)) if margin > 0 else None
