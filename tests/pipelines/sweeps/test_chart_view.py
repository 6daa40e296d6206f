"""The link that a sweep prints opens, in a real browser, the chart that it promises.

A real `mlflow server`, and Chromium without a screen through Playwright; skipped, visibly, without one. The page's
picture stays in the test's folder.
"""

import json
import math
import shutil
from collections.abc import Iterator
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
BUDGET, DECISIONS = 1e6, 20
LOSSES = [1.3 + 2 * math.exp(-5 * k / DECISIONS) for k in range(DECISIONS + 1)]
SUMMARIES = [{"val_curve": [{"budget_fraction": k / DECISIONS, "val_loss": loss} for k, loss in enumerate(LOSSES)]}]

# Of each chart on the page: what its axis is called, its lines as x, the colours of its bands, and its legend's text.
READ = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => ({
    axis: plot.layout.xaxis.title?.text,
    range: plot.layout.yaxis.range,
    lines: plot.data.filter(line => !line.fill).map(line => line.x),
    bands: plot.data.filter(line => line.fill).map(line => line.fillcolor),
    text: plot.parentElement.parentElement.parentElement.textContent,
}))"""
DRAWN = """() => document.querySelectorAll('.js-plotly-plot').length >= 2 &&
    [...document.querySelectorAll('.js-plotly-plot')].every(plot => plot.data?.length > 2)"""


def trial(client: MlflowClient, parent: Tracker, label: str, seed: int, purpose: str) -> None:
    """A run as a sweep logs it, with less in it."""
    tags = {"kind": "trial", "label": label, "seed": str(seed), "purpose": purpose, CURVE: CURVES[label]}
    tags |= {"mlflow.parentRunId": parent.run_id or ""}
    run = client.create_run(parent.experiment_id or "", tags=tags, run_name=f"{label}-seed{seed}-{purpose}")
    now, metrics = milliseconds(), []
    for k, loss in enumerate(LOSSES):
        value, cost, step = loss + 0.03 * LABELS.index(label) + 0.05 * seed, BUDGET * k / DECISIONS, 100 * k + seed
        for kind, at in {"grid": k, **({"annealed": step} if k in (5, 10, 15) else {})}.items():
            metrics += [Metric(f"{kind}/val_loss", value - 0.1 * (kind == "annealed"), now, at)]
            metrics += [Metric(f"{kind}/parameter_seconds", cost, now, at)]
    client.log_batch(run.info.run_id, metrics)
    client.set_terminated(run.info.run_id)


def start(folder: Path, experiment: str, name: str = "sweep") -> Tracker:
    return Tracker(folder / name, experiment, name, key=f"{experiment}/{name}", tags={"kind": "sweep"})


@pytest.fixture
def server(template: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path, f"sqlite:///{shutil.copy(template, tmp_path)}") as running:
        running.start()
        yield running


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")
def test_the_link_opens_loss_against_cost_by_label(server: MlflowServer, monkeypatch, tmp_path: Path):
    from playwright.sync_api import sync_playwright

    assert len({_color(label) for label in LABELS}) < len(LABELS)  # without care two arms would have one colour
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    client = MlflowClient(server.uri)
    with start(tmp_path, "esper-chart", "another") as another, start(tmp_path, "esper-chart", "this") as parent:
        for label in LABELS:
            trial(client, another, label, 0, "test")
            for seed, purpose in ((0, "test"), (1, "test"), (9, "tuning")):
                trial(client, parent, label, seed, purpose)
        share_view(parent, "flops", [])  # no trial has ended yet; once more replaces the view
        url = share_view(parent, "parameter_seconds", SUMMARIES)
    assert url
    assert url.startswith(server.uri)
    group = client.get_experiment(parent.experiment_id or "")
    assert [tag for tag in group.tags if tag.startswith(TAG)] == [f"{TAG}{parent.run_id}"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1600, "height": 1500})
        page.goto(url)
        page.wait_for_function(DRAWN, timeout=120_000)
        page.screenshot(path=tmp_path / "chart.png")
        (curve, annealed), text = page.evaluate(READ), page.inner_text("body")
        chromium.close()
    assert (curve["axis"], annealed["axis"]) == ("grid/parameter_seconds", "annealed/parameter_seconds")
    for label in LABELS:
        assert f"{label} (grid/val_loss)" in " ".join(curve["text"].split())  # the legend
    assert len(set(curve["bands"])) == len(curve["bands"]) == len(LABELS)
    assert "Unassigned" not in text  # the parent is no curve
    assert f"{2 * len(LABELS)} matching runs" in text  # neither the other sweep's, nor the tuning runs
    assert curve["lines"]
    assert all(line == [BUDGET * k / DECISIONS for k in range(DECISIONS + 1)] for line in curve["lines"])
    low, high = curve["range"]  # of what comes after the steep start
    assert 1 < low < 1.35
    assert 2.5 < high < 2.7


def test_a_file_needs_a_command_first_and_another_mlflow_clicks(store: str, monkeypatch, tmp_path: Path):
    with start(tmp_path, "esper-file") as parent:
        view = share_view(parent, "parameter_seconds", SUMMARIES)
        monkeypatch.setattr(chart_view, "TESTED", "99.")
        other = share_view(parent, "flops", [])
    first = f"start `mlflow ui --backend-store-uri {store} --host 127.0.0.1`, then open "
    page = f"{first}http://127.0.0.1:5000/#/experiments/{parent.experiment_id}/runs"
    assert view == f"{page}?viewStateShareKey={parent.run_id}&compareRunsMode=CHART"
    assert other == f"{page} (choose the chart view, then in its gear X-axis, Metric, flops)"
    [tag] = [v for k, v in MlflowClient(store).get_experiment(parent.experiment_id or "").tags.items() if TAG in k]
    assert "parameter_seconds" in json.loads(tag)["name"]
