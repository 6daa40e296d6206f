"""The link that a sweep prints opens, in a real browser, the chart that it promises.

A real `mlflow server`, and Chromium without a screen through Playwright; skipped, visibly, without one. The page's
picture stays in the test's folder.
"""

import base64
import json
import math
import shutil
import zlib
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from esper.pipelines.sweeps import chart_view
from esper.pipelines.sweeps.chart_view import CURVE, TAG, _color, curve_names, share_view
from esper.platform.tracking import Tracker, milliseconds
from tests.mlflow_servers import MlflowServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LABELS = ["gradual", "lag", "onejump", "random:tamiyo", "static-1", "static-2", "static_final:tamiyo", "tamiyo"]
CURVES = curve_names(LABELS)
SUMMARIES = [
    {"val_curve": [{"budget_fraction": k / 20, "val_loss": 1.3 + 2 * math.exp(-5 * k / 20)} for k in range(21)]}
]
BUDGET, DECISIONS = 1e6, 20

# Of each chart on the page: what its axis is called, its lines as x, the colours of its bands, and its legend's text.
READ = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => ({
    axis: plot.layout.xaxis.title?.text,
    range: plot.layout.yaxis.range,
    lines: plot.data.filter(line => !line.fill).map(line => line.x),
    bands: plot.data.filter(line => line.fill).map(line => line.fillcolor),
    text: plot.parentElement.parentElement.parentElement.textContent,
}))"""


def loss(label: str) -> float:
    """That an arm comes to."""
    return 1.3 + 0.03 * LABELS.index(label)


def trial(
    client: MlflowClient, experiment: str, parent: str, label: str, seed: int, purpose: str, grid: str = "{}"
) -> None:
    """A run as a sweep logs it, with less in it; each value in `grid` adds to its losses."""
    tags = {"kind": "trial", "label": label, "seed": str(seed), "purpose": purpose, "mlflow.parentRunId": parent}
    tags |= {"grid": grid, CURVE: CURVES[label]}
    run = client.create_run(experiment, tags=tags, run_name=f"{label}-seed{seed}-{purpose}")
    now, metrics = milliseconds(), []
    for k in range(DECISIONS + 1):
        cost = BUDGET * k / DECISIONS
        value = loss(label) + 2 * math.exp(-5 * k / DECISIONS) + 0.05 * seed + sum(json.loads(grid).values())
        step = 100 * k + seed
        metrics += [Metric("val_loss", value, now, step), Metric("parameter_seconds", cost, now, step)]
        metrics += [Metric("grid/val_loss", value, now, k), Metric("grid/parameter_seconds", cost, now, k)]
        if k in (5, 10, 15):
            metrics += [Metric("annealed/val_loss", value - 0.1, now, step)]
            metrics += [Metric("annealed/parameter_seconds", cost, now, step)]
    client.log_batch(run.info.run_id, metrics)
    client.set_terminated(run.info.run_id)


def start(folder: Path, experiment: str, name: str = "sweep") -> Tracker:
    return Tracker(folder / name, experiment, name, key=f"{experiment}/{name}", tags={"kind": "sweep"})


def sweep(folder: Path, uri: str, name: str) -> Tracker:
    """A sweep's own run, with two test trials an arm, and others that the chart is not to show."""
    parent = start(folder, "esper-chart", name)
    assert parent.run_id
    assert parent.experiment_id
    client = MlflowClient(uri)
    for label in LABELS:
        for seed, purpose in ((0, "test"), (1, "test"), (100, "tuning")):
            trial(client, parent.experiment_id, parent.run_id, label, seed, purpose)
    return parent


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")
def test_the_link_opens_loss_against_cost_by_label(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from playwright.sync_api import sync_playwright

    assert len({_color(label) for label in LABELS}) < len(LABELS)  # without care two arms would have one colour
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with sweep(tmp_path, server.uri, "another"), sweep(tmp_path, server.uri, "this") as parent:
        url = share_view(parent, "parameter_seconds", SUMMARIES)
    assert url
    assert url.startswith(server.uri)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1500})
        page.goto(url)
        page.wait_for_function(
            "() => document.querySelectorAll('.js-plotly-plot').length >= 2 && "
            "[...document.querySelectorAll('.js-plotly-plot')].every(plot => plot.data?.length > 3)",
            timeout=90_000,
        )
        page.screenshot(path=tmp_path / "chart.png")
        curve, annealed = page.evaluate(READ)
        text = page.inner_text("body")
        browser.close()
    assert curve["axis"] == "grid/parameter_seconds"
    assert annealed["axis"] == "annealed/parameter_seconds"
    for label in LABELS:
        assert f"{label} (grid/val_loss)" in " ".join(curve["text"].split())  # the legend
    assert len(set(curve["bands"])) == len(curve["bands"]) == len(LABELS)
    assert "Unassigned" not in text  # the parent is no curve
    assert f"{2 * len(LABELS)} matching runs" in text  # neither the other sweep's, nor the tuning runs
    assert curve["lines"]
    assert all(line == [BUDGET * k / DECISIONS for k in range(DECISIONS + 1)] for line in curve["lines"])
    low, high = curve["range"]
    assert 1 < low < 1.35
    assert 2.5 < high < 2.7


def test_once_more_replaces_the_view(server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with start(tmp_path, "esper-twice") as parent:  # no trial has ended yet
        first, second = share_view(parent, "flops", []), share_view(parent, "flops", [])
    assert first == second
    group = MlflowClient(server.uri).get_experiment_by_name("esper-twice")
    assert group
    assert [tag for tag in group.tags if tag.startswith(TAG)] == [f"{TAG}{parent.run_id}"]


def test_a_file_needs_a_command_first_and_the_scale_is_of_what_comes_after_the_start(store: str, tmp_path: Path):
    with start(tmp_path, "esper-file") as parent:
        view = share_view(parent, "parameter_seconds", SUMMARIES)
    command = f"mlflow ui --backend-store-uri {store} --host 127.0.0.1"
    page = f"http://127.0.0.1:5000/#/experiments/{parent.experiment_id}/runs"
    assert view == f"start `{command}`, then open {page}?viewStateShareKey={parent.run_id}&compareRunsMode=CHART"
    packed = json.loads(MlflowClient(store).get_experiment(parent.experiment_id).tags[f"{TAG}{parent.run_id}"])["state"]
    state = json.loads(zlib.decompress(base64.b64decode(packed.removeprefix("deflate;"))))
    scale = state["compareRunCharts"][0]["range"]
    assert 1.2 < scale["yMin"] < 1.32
    assert 2.5 < scale["yMax"] < 2.7


def test_more_curves_than_colours_share_them():
    names = curve_names([f"arm-{i}" for i in range(60)])
    assert [text.strip() for text in names.values()] == list(names)
    assert len({_color(text) for text in names.values()}) == chart_view.COLORS


def test_another_mlflow_gets_no_tag_but_the_clicks(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(chart_view, "TESTED", "99.")
    with start(tmp_path, "esper-other") as parent:
        view = share_view(parent, "flops", [])
    page = f"{server.uri}/#/experiments/{parent.experiment_id}/runs"
    assert view == f"{page} (choose the chart view, then in its gear X-axis, Metric, flops)"


def test_no_server_no_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    parent = start(tmp_path, "esper-chart")
    assert share_view(parent, "flops", []) is None
    parent.close(seconds=0)
