"""`esper report`: what MLflow holds comes back as it was logged, is judged, and becomes a page that stands alone.

Real stores, SQLite files, filled by synthetic_sweeps.py.
"""

import json
import re
import shutil
import socket
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
from mlflow import MlflowClient

from esper.pipelines import report
from esper.pipelines.reports.figures import draw_differences, draw_losses
from esper.pipelines.reports.page import arm_table, payback, short_tables
from esper.pipelines.reports.runs import AXES
from esper.pipelines.reports.verdict import judge
from esper.platform.errors import UserError
from tests.pipelines.reports.synthetic_sweeps import BUDGET, FAILED, PROVENANCE, SyntheticSweep, graft, log

EXPERIMENT = "esper-tinystories"
LOST = {
    "label": "onejump",
    "grid": "{}",
    "purpose": "test",
    "status": "failed",
    "error": "OSError: no space left on the device",
}
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
RATED = {key: {"label": "tamiyo", "grid": "{}", "status": "done", "purpose": "rates"} for key in ("a", "b")}
SPENT = {part: {"parameter_seconds": cost, "flops": 1.0} for part, cost in {"rates": 1e6, "tuning": 5e5}.items()}
TUNED = SWEEP.point(settings={"static-2": [0.003, 0.4], "tamiyo": [1.5, 0.6]}, spent=SPENT)
MISSING = LOST | {"status": "missing", "error": None}
RECORD = SWEEP.sweep(trials={"onejump-2": LOST, "ppo-9": MISSING, **RATED}, points=[TUNED])
FEW = SyntheticSweep(statics={1: 1.4}, grown={}, seeds=(0,), tuning_seeds=())


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


def test_load_takes_all_sweeps_or_one(store, capfd, refused):
    client = MlflowClient(store)
    first, second = (log(client, FEW.runs(), FEW.sweep(), name)["parent"] for name in ("first", "second"))
    assert set(report.load(EXPERIMENT).finals["sweep"]) == {first, second}
    assert set(report.load(EXPERIMENT, sweep="first").finals["sweep"]) == {first}
    assert set(report.load(EXPERIMENT, sweep=second).finals["sweep"]) == {second}
    assert "Did you mean 'first'?" in refused(report.main, ["--sweep", "frist"], "unknown sweep 'frist'")
    report.main([])
    assert "sweep   second of" in capfd.readouterr().err  # the newest


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
    words += ["static-2 0.003 until 40% (0 runs); tamiyo ×1.5 until 60% (2 runs)", "1,000,000 for the search for rates"]
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


def test_a_sweep_on_images_shows_accuracy_beside_the_loss(made: SimpleNamespace):
    right = {("tamiyo", seed): {"accuracy": value} for seed, value in zip(SWEEP.seeds, (0.25, 0.5, 0.75), strict=True)}
    own = {(label, seed): {"accuracy": 0.9} for label in SWEEP.truths() for seed in SWEEP.seeds}
    sweep = replace(SWEEP, edits={**own, **right})
    verdict = judge(sweep.runs(), sweep.point(), sweep.sweep())
    told = arm_table(verdict).set_index("arm")["accuracy"]
    assert told["static-2"] == "0.9000 ± 0.0000"
    assert told["tamiyo"].startswith("0.5000 ± 0.62")
    [shown] = short_tables([verdict])
    assert shown.index("final loss") < shown.index("accuracy") < shown.index("minus static-2")
    assert "accuracy" not in made.html
    assert "What each arm writes" not in made.html


def test_the_page_shows_what_each_arm_writes(store, tmp_path):
    texts = {(label, seed): {"sample": f"Once {label} <{seed}>"} for label in FEW.truths() for seed in FEW.seeds}
    sweep = replace(FEW, edits=texts)
    log(MlflowClient(store), sweep.runs(), sweep.sweep())
    assert report.main(["--out", str(tmp_path / "report")]) == 0
    shown = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "What each arm writes" in shown
    assert "Once static-1 &lt;0&gt;" in shown


def test_a_sweep_that_was_stopped_before_its_tests_has_a_report(store, capfd):
    sweep = SyntheticSweep(seeds=())
    log(MlflowClient(store), sweep.runs(), sweep.sweep())
    assert (report.main([]), "Empty" in capfd.readouterr().out) == (0, False)


def test_the_command_says_the_verdict_on_each_grid_point(store, capfd, refused):
    points = [replace(FEW, grid=f'{{"budget.amount": {amount}}}') for amount in (500000, 1000000)]
    runs = [replace(run, name=f"{run.name}{point.grid}") for point in points for run in point.runs()]
    ids = log(MlflowClient(store), runs, FEW.sweep(points=[point.point() for point in points]))
    assert report.main(["--sweep", ids["parent"]]) == 0
    out, printed = Path("reports", "a-sweep"), capfd.readouterr()
    assert f"results: {out}/report.html" in printed.err
    refused(report.main, [], "already holds")
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


PAID: dict[str, Any] = SPENT | {"controller": {"parameter_seconds": 1.5e6}}
TEXT = {"trained_on": "text"}
ALL = "cost 3,000,000 parameter-seconds that no arm's budget contains: 1,000,000 for the search for rates.*in flight.*"


@pytest.mark.parametrize(
    ("controller", "spent", "ppo", "budgets", "told"),
    [
        (TEXT, PAID, 1.3, 4, ALL + r"need 2,\d+,\d+ for that loss: the cost is paid back after 3 uses"),
        (TEXT, PAID, 1.1, 1, ALL + "no static run ends as low: what a use saves cannot be said"),
        (TEXT, PAID, 1.5, 1, ALL + "a use saves nothing"),
        (TEXT, None, 1.1, 1, "is not known"),
        (TEXT, PAID | {"controller": None}, 1.1, 1, "is not known"),
        (None, PAID, 1.1, 1, "^$"),
    ],
)
def test_after_how_many_uses_the_controller_has_paid(controller, spent, ppo, budgets, told):
    """It ends at a loss after one budget, beside a static size that ends at 1.2 after so many."""
    cost = {"static-2": {"parameter_seconds": budgets * BUDGET}}
    sweep = SyntheticSweep(statics={2: 1.2}, grown={"ppo": ppo}, cost=cost)
    point = sweep.point(controller=controller, spent=spent)
    said = " ".join(payback(judge(sweep.runs(), point, sweep.sweep()).trials))
    assert re.search(told, said), said


def test_the_range_of_losses_holds_every_end_and_each_graft_is_marked(made: SimpleNamespace):
    trials, axes = judge(made.runs, SWEEP.point(), RECORD).trials, plt.figure().subplots()
    draw_losses(axes, trials, trials.axis)
    sound = [run for run in trials.test_runs() if run.sound]
    low, *_, high = sorted([*axes.get_ylim(), *(run.loss for run in sound)])
    assert (low, high) == axes.get_ylim()
    marks = [line.get_xdata() for line in axes.lines if line.get_marker() == "^"]
    assert sum(map(np.size, marks)) == sum(run.grafts for run in sound)


def test_no_interval_is_cut_whose_mean_is_in_the_picture():
    """A size's neither, and one that is far from the best lies outside."""
    edits: dict[Any, dict[str, Any]] = {("static-3", seed): {"val_loss": loss} for seed, loss in ((1, 1.1), (2, 1.3))}
    sweep = SyntheticSweep(statics={1: 1.4, 2: 1.2, 3: 1.2}, grown={"tamiyo": 1.2}, final_size=1.2, edits=edits)
    draw_differences(axes := plt.figure().subplots(), judge(sweep.runs(), sweep.point(), sweep.sweep()).trials)
    names = [label.get_text().split()[0] for label in axes.get_yticklabels()]
    drawn = [bars[2][0].get_segments()[0][:, 0] for bars in axes.containers]  # of each interval its ends
    ends = dict(zip(names, drawn, strict=True))
    low, high = ends.pop("static-3")
    assert axes.get_xlim()[0] < low < -0.08
    assert 0.08 < high < axes.get_xlim()[1] < min(ends.pop("static-1"))
    assert all(low < min(each) <= max(each) < high for each in ends.values())


def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("mlruns").mkdir()
    for uri in ("sqlite:///mlflow.db", "sqlite:///no/mlflow.db", "file:./no", "mlruns"):
        refused(report.main, ["--tracking-uri", uri], "there is no MLflow store")
    texts = {"empty.db": b"", "text.db": b"no database at all, only a text that is long enough"}
    for name, text in texts.items():
        Path(name).write_bytes(text)
        refused(report.main, ["--tracking-uri", f"sqlite:///{name}"], "MLflow")
        assert Path(name).read_bytes() == text
    assert {path.name for path in tmp_path.iterdir()} - {"text.db.lock"} == {"mlruns", *texts}


@pytest.mark.parametrize("uri", ["nonsense://x", "http://", "http://me:secret@127.0.0.1:9", "http://127.0.0.1:{port}"])
def test_a_store_that_refuses_or_never_answers(refused, monkeypatch, uri: str):
    monkeypatch.setattr("esper.pipelines.reports.runs.SECONDS", 3)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = uri.format(port=server.getsockname()[1])
        assert "secret" not in refused(report.main, ["--tracking-uri", uri], "cannot be read")
    assert time.monotonic() - began < 60  # MLflow's own retries take minutes


def test_experiments_that_are_not_there_or_have_nothing_to_tell(store, refused):
    client = MlflowClient(store)
    client.create_run(client.create_experiment("esper-tinystories-old"), tags={"kind": "sweep"})
    refused(report.main, [], "no such sweep with a sweep.json")
    refused(report.main, ["Default"], "no such sweep with a sweep.json")
    refused(report.main, [EXPERIMENT], "Did you mean 'esper-tinystories-old'?")
    refused(report.main, ["runs/nothere"], "runs/nothere does not exist, and `esper report` takes the name of an exp")
    refused(report.main, ["/tmp"], "/tmp is a path, and `esper report` takes the name of an exp")
    failed = replace(FEW, edits={"static-1": FAILED})
    log(client, failed.runs(), failed.sweep(), "lost")
    refused(report.main, [], "no trial has finished")
    with pytest.raises(UserError, match="no trial has finished"):
        report.load(EXPERIMENT)
