"""What a person sees after a sweep on real text: the printed link and the report, in a real browser.

Alone: `pytest tests/pipelines/test_sweep_seen.py`; the pictures stay in the test's folder.
"""

import json
import re
from pathlib import Path

import pytest

from esper.pipelines import sweep
from tests.conftest import TINYSTORIES
from tests.mlflow_servers import mlflow_server
from tests.pipelines.sweeps.test_chart_view import CHROMIUM, READ

ARMS = "static,onejump,tamiyo,random,lag"
FLAGS = ["--preset", "tinystories-char", "--set", "budget.amount=60000", "--set", "budget.decisions=8"]


@pytest.mark.timeout(1200)
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")
@pytest.mark.skipif(not TINYSTORIES.exists(), reason=f"no TinyStories at {TINYSTORIES}")
def test_five_arms_on_two_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    from playwright.sync_api import sync_playwright

    store, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "sweep"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    assert sweep.main([*FLAGS, "--data", str(TINYSTORIES), "--arms", ARMS, "--seeds", "2", "--out", str(out)]) == 0
    printed = capfd.readouterr().err
    link = re.search(r"compare: start `(.*)`, then open (http://127.0.0.1:5000\S+)", printed)
    assert link
    assert link[1] == f"mlflow ui --backend-store-uri {store} --host 127.0.0.1"
    labels = json.loads((out / "sweep.json").read_text())["arms"]
    assert len(labels) == 5
    with mlflow_server(tmp_path, store) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1500})
        page.goto(link[2].replace("http://127.0.0.1:5000", server.uri))
        page.wait_for_function(
            "() => [...document.querySelectorAll('.js-plotly-plot')].some(plot => plot.data?.length >= 5)",
            timeout=120_000,
        )
        page.screenshot(path=tmp_path / "chart.png")
        chart = page.evaluate(READ)[0]
        text = page.inner_text("body")
        page.goto((out / "report" / "report.html").as_uri())
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        report = page.inner_text("body")
        browser.close()
    assert chart["axis"] == "grid/parameter_seconds"
    for label in labels:
        assert f"{label} (grid/val_loss)" in text
        assert label in report
    assert "fewer than 5 test seeds" in report.lower() or "test seeds" in report
