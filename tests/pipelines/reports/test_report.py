"""`esper report`: what MLflow holds comes back as it was logged, is judged, and becomes a page that stands alone.

Real stores, SQLite files, filled by synthetic_sweeps.py. One test opens the page in Chromium, where there is one.
"""

import json
import re
import shutil
import socket
import subprocess
import time
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from mlflow import MlflowClient

from esper.pipelines import report
from esper.pipelines.reports.figures import PALETTE, draw_losses, looks
from esper.pipelines.reports.page import payback
from esper.pipelines.reports.runs import AXES
from esper.pipelines.reports.verdict import judge
from esper.platform.errors import UserError
from tests.pipelines.reports.synthetic_sweeps import BUDGET, FAILED, PROVENANCE, SyntheticSweep, graft, log

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXPERIMENT = "esper-tinystories"
LOST = {"label": "onejump", "grid": "{}", "status": "failed", "error": "OSError: no space left on the device"}
UNDONE = [graft(site="<b>layer</b> 1", outcome="pruned"), graft(budget_fraction=0.7, blueprint="ffn", outcome="kept")]
ROLLBACK = {"budget_fraction": 0.8, "decision": 6, "optimizer_step": 80, "fault": "x", "removed": "ffn at layer 1"}
SWEEP = SyntheticSweep(
    grown={"tamiyo": 1.2, "onejump": 1.3, "ppo": 1.19, "random:tamiyo": 1.4, "lag": 1.4},
    idle=("lag",),
    statics={1: 1.4, 2: 1.2},
    seeds=(0, 1, 2),
    tuning_seeds=(101,),
    edits={
        ("onejump", 2): FAILED,
        ("random:tamiyo", 1): {"diverged": True, "failure": "the loss was not finite"},
        ("ppo", 0): {"grafts": UNDONE, "rollbacks": [ROLLBACK], "prunes": [UNDONE[0] | {"budget_fraction": 0.6}]},
    },
)
RECORD = SWEEP.sweep(trials={"onejump-2": LOST, "ppo-9": LOST | {"status": "missing", "error": None}})
FEW = SyntheticSweep(statics={1: 1.4}, grown={}, seeds=(0,), tuning_seeds=())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a refusal, within seconds."""
    began = time.monotonic()
    assert report.main(list(arguments)) == 2
    assert time.monotonic() - began < 60  # MLflow's own retries take minutes
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def made(template: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The report on a sweep with a failed, a diverged and a missing trial, beside foreign runs."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{shutil.copy(template, folder)}"
    client, runs = MlflowClient(uri), SWEEP.runs()
    ids = log(client, runs, RECORD)
    experiment = client.get_run(ids["parent"]).info.experiment_id
    client.create_run(experiment, tags={"mlflow.parentRunId": ids["parent"]}, run_name="no trial")
    client.create_run(experiment, tags={"kind": "sweep"}, run_name="newer, without a sweep.json")
    assert report.main(["--tracking-uri", uri, "--out", str(folder / "report")]) == 0
    page, told = ((folder / "report" / name).read_text(encoding="utf-8") for name in ("report.html", "report.json"))
    return SimpleNamespace(uri=uri, runs=runs, ids=ids, folder=folder / "report", html=page, json=json.loads(told))


def test_load_gives_back_what_was_logged(made: SimpleNamespace):
    tables = report.load(EXPERIMENT, tracking_uri=made.uri)
    finals = tables.finals.set_index("name")
    assert set(finals.index) == {run.name for run in made.runs}
    for run in made.runs:
        row, own = finals.loc[run.name], tables.curves[tables.curves["run_id"] == made.ids[run.name]]
        assert (row["sweep"], row["run_id"]) == (made.ids["parent"], made.ids[run.name])
        assert all(row[key] == getattr(run, key) for key in ("label", "arm", "seed", "purpose", "grid", "status"))
        assert pd.isna(row["size"]) if run.size is None else row["size"] == run.size
        assert row["val_loss"] == run.loss or (pd.isna(row["val_loss"]) and not run.sound)
        assert row["diverged"] == run.diverged
        if run.summary:
            assert all(row[key] == run.summary[key] for key in (*AXES, "steps", "parameters"))
            assert all(row[key] == len(run.summary[key]) for key in ("grafts", "prunes", "rollbacks"))
            for kind, points in (("decision", run.summary["val_curve"]), ("annealed", run.annealed)):
                for column in ("steps", "budget_fraction", *AXES, "parameters", "val_loss"):
                    assert own[own["kind"] == kind][column].to_list() == [point[column] for point in points]
    events = tables.timeline[tables.timeline["run_id"] == made.ids["ppo-0"]].to_dict("records")
    assert [e["event"] for e in events] == ["graft", "prune", "graft", "rollback"]
    assert [events[0][key] for key in ("blueprint", "site", "outcome")] == ["block", "<b>layer</b> 1", "pruned"]
    assert events[-1]["blueprint"] == "ffn at layer 1"


def test_load_takes_all_sweeps_or_one(store: str, capsys: pytest.CaptureFixture[str]):
    client = MlflowClient(store)
    first, second = (log(client, FEW.runs(), FEW.sweep(), name)["parent"] for name in ("first", "second"))
    assert set(report.load(EXPERIMENT).finals["sweep"]) == {first, second}
    assert set(report.load(EXPERIMENT, sweep="first").finals["sweep"]) == {first}
    assert set(report.load(EXPERIMENT, sweep=second).finals["sweep"]) == {second}
    assert "unknown sweep 'frist'" in (said := refused(capsys, "--sweep", "frist"))
    assert "Did you mean 'first'?" in said
    report.main([])
    assert "sweep   second of" in capsys.readouterr().err  # the newest


def test_the_page_stands_alone_and_shows_everything(made: SimpleNamespace):
    [reference] = re.findall(r"""\b(?:src|href|srcset|action|poster)\s*=\s*["']?([^"'>]*)""", made.html)
    assert reference.startswith("data:image/svg+xml;base64,")
    assert not re.search(r"<(script|link|iframe|object|b)\b|@import|url\(", made.html)
    shown = " ".join(unescape(re.sub("<[^>]*>", "", made.html)).split())
    [verdict] = made.json["verdicts"]
    told = [text for c in verdict["criteria"] for text in (c["sentence"], c["outcome"], *c["withheld"])]
    labels = [*SWEEP.truths(), "onejump-2", "ppo-9", "missing", "failed", "diverged", "did not grow"]
    words = ["no space left on the device", "the loss was not finite", "<b>layer</b> 1", *PROVENANCE.values()]
    words += ["--arms static,ppo & more", "test seeds0, 1, 2"]
    for text in (*told, *labels, *words):
        assert text in shown
    assert ">better<" not in made.html  # three seeds
    assert all(f"{run.loss:.4f}" in shown for run in made.runs if run.sound and run.purpose == "test")


def test_json_is_the_verdict_and_all_is_kept_with_the_sweep(made: SimpleNamespace):
    [told], verdict = made.json["verdicts"], judge(made.runs, SWEEP.point(), RECORD)
    assert told["tests"] == json.loads(json.dumps([test.as_dict() for test in verdict.tests]))
    assert [criterion["sentence"] for criterion in told["criteria"]] == [c.sentence for c in verdict.criteria]
    finals = {row["name"]: row["val_loss"] for row in made.json["finals"]}
    assert finals == {run.name: run.loss if run.sound else None for run in made.runs}
    assert [arm["arm"] for arm in told["arms"]][:3] == ["static-1", "static-2", "tamiyo"]
    assert made.ids["parent"] in made.json["provenance"]["MLflow"]
    kept = {file.path for file in MlflowClient(made.uri).list_artifacts(made.ids["parent"], "report")}
    assert kept == {f"report/{name}" for name in report.FILES}


def test_the_command_says_the_verdict_on_each_grid_point(store: str, capsys: pytest.CaptureFixture[str]):
    points = [replace(FEW, grid=f'{{"budget.amount": {amount}}}') for amount in (500000, 1000000)]
    runs = [replace(run, name=f"{run.name}{point.grid}") for point in points for run in point.runs()]
    ids = log(MlflowClient(store), runs, FEW.sweep(points=[point.point() for point in points]))
    assert report.main(["--sweep", ids["parent"]]) == 0
    out, printed = Path("reports", "a-sweep"), capsys.readouterr()
    assert f"results: {out}/report.html" in printed.err
    assert "already holds" in refused(capsys)
    (out / "report.html").unlink()
    report.write_report(report.read_sweeps(store, None, ids["parent"])[0], out)  # over the older one
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "What the controller cost" not in text
    verdicts = json.loads((out / "report.json").read_text(encoding="utf-8"))["verdicts"]
    for verdict, amount in zip(verdicts, (500000, 1000000), strict=True):
        assert f"budget.amount = {amount}" in text
        for criterion in verdict["criteria"]:
            assert f"{criterion['criterion']}: {criterion['outcome']}. {criterion['sentence']}" in printed.out
            assert all(f"  - {reason}" in printed.out for reason in criterion["withheld"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(made: SimpleNamespace, tmp_path: Path):
    page, picture = (made.folder / "report.html").as_uri(), tmp_path / "page.png"
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'me'}"]
    shot = [f"--screenshot={picture}", "--window-size=390,3000", "--hide-scrollbars", page]
    subprocess.run([*command, *shot], check=True, capture_output=True, timeout=120)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (3000, 390)
    assert min(pixels[i : i + 300].std() for i in range(0, 3000, 300)) > 0.01  # no band is blank


COSTS = {"rates": 1e6, "tuning": 5e5, "controller": 1.5e6}
SPENT: dict[str, Any] = {part: {"parameter_seconds": cost, "flops": 1.0} for part, cost in COSTS.items()}


def paid(spent: dict[str, Any] | None, ppo: float, budgets: float = 1, **point: Any) -> list[str]:
    """Of a controller that ends at a loss after one budget, beside a static size that ends at 1.2 after so many."""
    cost = {"static-2": {"parameter_seconds": budgets * BUDGET}}
    sweep = SyntheticSweep(statics={2: 1.2}, grown={"ppo": ppo}, cost=cost)
    point = sweep.point(controller={"trained_on": "text"}, spent=spent) | point
    return payback(judge(sweep.runs(), point, sweep.sweep()).trials)


@pytest.mark.parametrize(
    ("ppo", "budgets", "told"),
    [
        (1.3, 4, r"need 2,\d+,\d+ for that loss: the cost is paid back after 3 uses"),
        (1.1, 1, "no static run ends as low: what a use saves cannot be said"),
        (1.5, 1, "a use saves nothing"),
    ],
)
def test_after_how_many_uses_the_controller_has_paid(ppo, budgets, told):
    cost, one = paid(SPENT, ppo, budgets)
    assert "cost 3,000,000 parameter-seconds that no arm's budget contains: 1,000,000 for the search for rates" in cost
    assert "forks, and episodes dropped or in flight" in cost
    assert re.search(told, one), one


@pytest.mark.parametrize("spent", [None, SPENT | {"controller": None}])
def test_a_cost_that_is_not_wholly_known_is_not_told(spent):
    [told] = paid(spent, 1.1)
    assert "is not known" in told
    assert paid(SPENT, 1.1, controller=None) == []


def test_the_range_of_losses_holds_every_end_that_is_compared(made: SimpleNamespace):
    trials, axes = judge(made.runs, SWEEP.point(), RECORD).trials, plt.figure().subplots()
    draw_losses(axes, trials, trials.axis)
    sound = [run for run in trials.test_runs() if run.sound]
    low, *_, high = sorted([*axes.get_ylim(), *(run.loss for run in sound)])
    assert (low, high) == axes.get_ylim()
    assert axes.get_legend_handles_labels()[1] == [*trials.test, "best static, annealed", "graft"]
    drawn = sum(len(np.atleast_1d(line.get_xdata())) for line in axes.lines if line.get_marker() == "^")
    assert drawn == sum(run.grafts for run in sound)


def test_a_label_has_one_look_and_its_controls_its_colour():
    arms = [f"arm{i}" for i in range(len(PALETTE))]
    followers = [f"{kind}:{arm}" for kind in ("static_final", "static_lrpath", "random") for arm in arms]
    labels = ["static-1", "static-2", *arms, *followers, "random:static-2"]
    found = looks({label: "static" if label.startswith("static-") else "tamiyo" for label in labels})
    assert len({tuple(look.values()) for look in found.values()}) == len(labels)
    assert found["static_final:arm3"]["color"] == found["arm3"]["color"]
    assert found["static_final:arm3"]["mfc"] == "white"


def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("mlruns").mkdir()
    for uri in ("sqlite:///mlflow.db", "sqlite:///no/mlflow.db", "file:./no", "mlruns"):
        assert "there is no MLflow store" in refused(capsys, "--tracking-uri", uri)
    texts = {"empty.db": b"", "text.db": b"no database at all, only a text that is long enough"}
    for name, text in texts.items():
        Path(name).write_bytes(text)
        assert "MLflow" in refused(capsys, "--tracking-uri", f"sqlite:///{name}")
        assert Path(name).read_bytes() == text
    assert {path.name for path in tmp_path.iterdir()} - {"text.db.lock"} == {"mlruns", *texts}


@pytest.mark.parametrize("uri", ["nonsense://x", "http://", "http://me:secret@127.0.0.1:9", "http://127.0.0.1:{port}"])
def test_a_store_that_refuses_or_never_answers(capsys, monkeypatch, uri: str):
    monkeypatch.setattr("esper.pipelines.reports.runs.SECONDS", 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = refused(capsys, "--tracking-uri", uri.format(port=server.getsockname()[1]))
    assert "cannot be read" in said
    assert "secret" not in said


def test_experiments_that_are_not_there_or_have_nothing_to_tell(store: str, capsys: pytest.CaptureFixture[str]):
    client = MlflowClient(store)
    client.create_run(client.create_experiment("esper-tinystories-old"), tags={"kind": "sweep"})
    assert "no such sweep with a sweep.json" in refused(capsys)
    assert "no such sweep with a sweep.json" in refused(capsys, "Default")
    assert "Did you mean 'esper-tinystories-old'?" in refused(capsys, EXPERIMENT)
    failed = replace(FEW, edits={"static-1": FAILED})
    log(client, failed.runs(), failed.sweep(), "lost")
    assert "no trial has finished" in refused(capsys)
    with pytest.raises(UserError, match="no trial has finished"):
        report.load(EXPERIMENT)
