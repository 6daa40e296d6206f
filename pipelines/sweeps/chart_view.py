"""One link that opens a sweep in MLflow's own UI as a chart: validation loss against cost, a curve per arm.

MLflow keeps a saved view as a tag of the experiment: JSON whose `state` is "deflate;" and base64 of zlib-packed JSON.
The format is undocumented, so views are written only where the installed version is one that was tested.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from esper.platform.tracking import Tracker, milliseconds
from esper.platform.tracking_store import connect, runs_page

TESTED = "3.17."  # MLflow's versions
TAG = "mlflow.sharedViewState."
CURVE = "curve"  # the trials' tag that the chart groups by
COLORS = 29  # in MLflow's palette, from which a hash of a group's name picks
HEIGHT = 420  # of a chart, pixels
SETTLED = 0.1  # the share of the budget whose steep start does not set the scale


def share_view(run: Tracker, axis: str, summaries: Iterable[Mapping[str, Any]]) -> str | None:
    """Save or replace the chart of a sweep's test trials; returns how to open it, None where MLflow does not answer."""
    import mlflow  # only now: where it is imported first, the environment has been set for it

    if run.run_id is None or run.experiment_id is None:
        return None
    page = runs_page(run.uri, run.experiment_id)
    if not mlflow.__version__.startswith(TESTED):
        return f"{page} (choose the chart view, then in its gear X-axis, Metric, {axis})"
    state = zlib.compress(json.dumps(_state(run.run_id, axis, summaries)).encode())
    view = {"name": f"Sweep {run.run_id[:8]}: loss against {axis}", "createdAt": milliseconds()}
    view["state"] = "deflate;" + base64.b64encode(state).decode()
    try:
        connect(run.uri).set_experiment_tag(run.experiment_id, TAG + run.run_id, json.dumps(view))
    except Exception:  # the store's; the link is a convenience
        return None
    return f"{page}?viewStateShareKey={run.run_id}&compareRunsMode=CHART"


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


def _state(parent: str, axis: str, summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs page's state; what is left out keeps MLflow's own setting."""
    curves = [summary["val_curve"] for summary in summaries]
    losses = [point["val_loss"] for curve in curves for point in curve if point["budget_fraction"] >= SETTLED]
    scale = {"yMin": 0.98 * min(losses), "yMax": 1.02 * max(losses)} if losses else {}  # MLflow's own starts at 0
    charts: list[dict[str, Any]] = []
    for kind in ("grid", "annealed"):
        axes = {"metricKey": f"{kind}/val_loss", "xAxisKey": "metric", "selectedXAxisMetricKey": f"{kind}/{axis}"}
        look = {"range": scale, "useGlobalLineSmoothing": False, "lineSmoothness": 0, "runsCountToCompare": 1000}
        charts.append({"uuid": kind, "metricSectionId": "sweep", "type": "LINE", **axes, **look})
    hidden = ("Model metrics", "grid", "annealed", "System metrics")  # where MLflow's own charts lie, one a metric
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}' AND tags.purpose = 'test'",
        "orderByKey": "tags.`mlflow.runName`",  # not by date: MLflow then adds the parents, as a group of their own
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": CURVE}]},
        "useGroupedValuesInCharts": True,
        "isAccordionReordered": True,  # the sections stand as listed
        "compareRunSections": [
            {"uuid": "sweep", "name": "Sweep", "display": True, "columns": 1, "cardHeight": HEIGHT},
            *({"uuid": name, "name": name, "display": False} for name in hidden),
        ],
        "compareRunCharts": charts,
    }
