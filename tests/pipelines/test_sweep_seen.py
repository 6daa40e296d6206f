"""What a person sees after a small sweep on real text: the printed link and the report, in a real browser.

The pictures stay in the test's folder.
"""

import json
import re
from pathlib import Path

import pytest

from esper.pipelines import sweep
from tests.mlflow_servers import mlflow_server
from tests.pipelines.sweeps.test_chart_view import CHROMIUM, browser


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")
def test_five_arms_on_two_seeds(tmp_path: Path, store: str, tinystories: Path, capfd: pytest.CaptureFixture):
    out = tmp_path / "sweep"
    flags = ["--preset", "demo", "--data", str(tinystories), "--set", "budget.amount=6000", "--seeds", "2"]
    assert sweep.main([*flags, "--arms", "static,onejump,tamiyo,random,lag", "--out", str(out)]) == 0
    link = re.search(r"compare: start `(.*)`, then open (http://127.0.0.1:5000\S+)", capfd.readouterr().err)
    assert link
    assert link[1] == f"mlflow ui --backend-store-uri {store} --host 127.0.0.1"
    labels = json.loads((out / "sweep.json").read_text())["arms"]
    assert len(labels) == 5
    with mlflow_server(tmp_path, store) as server, browser(tmp_path / "chart.png") as look:
        (curve, annealed), page = look(link[2].replace("http://127.0.0.1:5000", server.uri))
        page.goto((out / "report" / "report.html").as_uri())
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        report = page.inner_text("body")
    assert (curve["axis"], annealed["axis"]) == ("grid/parameter_seconds", "annealed/parameter_seconds")
    assert len(set(curve["bands"])) == 5
    assert annealed["lines"]  # the baselines' cooldown points
    for label in labels:
        assert f"{label} (grid/val_loss)" in " ".join(curve["text"].split())
        assert label in report
