"""`esper report`: what MLflow holds comes back as it was logged, is judged, and becomes a page that stands alone.

Real stores, SQLite files, filled by synthetic_sweeps.py. One test opens the page in Chromium, where there is one.
"""

import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_sweeps import BUDGET, PROVENANCE, SyntheticSweep, graft, log

from esper.pipelines import report
from esper.pipelines.reports.figures import PALETTE, draw_differences, draw_losses, looks
from esper.pipelines.reports.page import payback
from esper.pipelines.reports.runs import AXES, Run
from esper.pipelines.reports.verdict import judge
from esper.platform.errors import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXPERIMENT = "esper-tinystories"
FAILED = {"label": "onejump", "grid": "{}", "status": "failed", "error": "OSError: no space left on the device"}
UNDONE = [graft(site="<b>layer</b> 1", outcome="pruned"), graft(budget_fraction=0.7, blueprint="ffn", outcome="kept")]
ROLLBACK = {"budget_fraction": 0.8, "decision": 6, "optimizer_step": 80, "fault": "x", "removed": "ffn at layer 1"}
SWEEP = SyntheticSweep(
    grown={"tamiyo": 1.2, "onejump": 1.3, "ppo": 1.19, "random:tamiyo": 1.4, "lag": 1.4},
    idle=("lag",),
    statics={1: 1.4, 2: 1.2},
    seeds=(0, 1, 2),
    tuning_seeds=(101,),
    edits={
        ("onejump", 2): {"status": "FAILED", "grafts": []},
        ("random:tamiyo", 1): {"diverged": True, "failure": "the loss was not finite"},
        ("ppo", 0): {"grafts": UNDONE, "rollbacks": [ROLLBACK], "prunes": [UNDONE[0] | {"budget_fraction": 0.6}]},
    },
)
RECORD = SWEEP.sweep(trials={"onejump-2": FAILED, "ppo-9": FAILED | {"status": "missing", "error": None}})
FEW = SyntheticSweep(statics={1: 1.4}, grown={}, seeds=(0,), tuning_seeds=())


class Made(NamedTuple):
    """A report that the command wrote on a store with a sweep, and what it printed."""

    uri: str
    runs: list[Run]
    ids: dict[str, str]
    folder: Path
    out: str
    err: str
    json: dict[str, Any]
    html: str


def ask(*arguments: str) -> tuple[int, str, str]:
    """The command's exit code and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = report.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: str) -> str:
    """The one sentence of a refusal, within seconds."""
    began = time.monotonic()
    code, out, err = ask(*arguments)
    assert time.monotonic() - began < 60  # MLflow's own retries take minutes
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with MLflow's tables and nothing in them: making them takes seconds, a copy none."""
    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="module")
def made(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of a sweep with a failed, a diverged and a missing trial, beside older and foreign runs."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{shutil.copy(empty, folder)}"
    client, runs = MlflowClient(uri), SWEEP.runs()
    ids = log(client, folder, runs, RECORD)
    experiment, parent = client.get_run(ids["parent"]).info.experiment_id, {"mlflow.parentRunId": ids["parent"]}
    trial = {"kind": "trial", "arm": "static", "label": "static-1", "seed": "7", "purpose": "test", "grid": "{}"}
    for tags in ({}, {"kind": "trial"}, trial | {"seed": "none"}, trial, trial | {"seed": "8"}):
        run = client.create_run(experiment, tags=tags | parent, run_name="<script>1</script>").info.run_id
        client.set_terminated(run)
    client.log_dict(run, {key: value for key, value in runs[0].summary.items() if key != "flops"}, "summary.json")
    client.create_run(experiment, tags={"kind": "sweep"}, run_name="newer, without a sweep.json")
    code, out, err = ask("--tracking-uri", uri, "--out", str(folder / "report"))
    assert code == 0, err
    page, told = ((folder / "report" / name).read_text(encoding="utf-8") for name in ("report.html", "report.json"))
    return Made(uri, runs, ids, folder / "report", out, err, json.loads(told), page)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with no store named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def client(empty: Path, here: Path) -> MlflowClient:
    """Of an empty store in the working directory."""
    shutil.copy(empty, here)
    return MlflowClient(f"sqlite:///{here}/mlflow.db")


def test_load_gives_back_what_was_logged(made: Made):
    tables = report.load(EXPERIMENT, tracking_uri=made.uri)
    finals = tables.finals.set_index("name")
    assert set(finals.index) == {run.name for run in made.runs}
    for run in made.runs:
        row, own = finals.loc[run.name], tables.curves[tables.curves["run_id"] == made.ids[run.name]]
        assert (row["sweep"], row["run_id"]) == (made.ids["parent"], made.ids[run.name])
        assert all(row[key] == getattr(run, key) for key in ("label", "arm", "seed", "purpose", "grid", "status"))
        assert pd.isna(row["size"]) if run.size is None else row["size"] == run.size
        assert all(row[key] == run.summary[key] for key in (*AXES, "steps", "wall_seconds", "parameters"))
        assert row["val_loss"] == run.loss or (pd.isna(row["val_loss"]) and not run.sound)
        assert row["diverged"] == run.diverged
        if run.status == "FINISHED":
            assert all(row[key] == len(run.summary[key]) for key in ("grafts", "prunes", "rollbacks"))
            for kind, points in (("decision", run.summary["val_curve"]), ("annealed", run.annealed)):
                for column in ("steps", "budget_fraction", *AXES, "parameters", "val_loss"):
                    assert own[own["kind"] == kind][column].to_list() == [point[column] for point in points]
    assert pd.api.types.is_float_dtype(tables.curves["val_loss"])
    events = tables.timeline[tables.timeline["run_id"] == made.ids["ppo-0"]].to_dict("records")
    assert [e["event"] for e in events] == ["graft", "prune", "graft", "rollback"]
    assert [events[0][key] for key in ("blueprint", "site", "outcome")] == ["block", "<b>layer</b> 1", "pruned"]
    assert [events[-1][key] for key in ("blueprint", "site")] == ["ffn", "layer 1"]


def test_runs_that_are_no_whole_trials_are_left_out_and_told(made: Made):
    told = "4 runs left out: without a trial"
    assert f"note    {told}" in made.err
    assert told in made.html


def test_load_takes_all_sweeps_or_one(client: MlflowClient, here: Path):
    first, second = (log(client, here, FEW.runs(), FEW.sweep(), name)["parent"] for name in ("first", "second"))
    assert set(report.load(EXPERIMENT).finals["sweep"]) == {first, second}
    assert set(report.load(EXPERIMENT, sweep="first").finals["sweep"]) == {first}
    assert set(report.load(EXPERIMENT, sweep=second).finals["sweep"]) == {second}
    assert "sweep   second of" in ask()[2]  # the newest
    with pytest.raises(UserError, match=r"unknown sweep 'frist'.* 'first'"):
        report.load(EXPERIMENT, sweep="frist")


def test_the_page_stands_alone_and_shows_everything(made: Made):
    references = re.findall(r"""\b(?:src|href|srcset|action|poster)\s*=\s*["']?([^"'>]*)""", made.html)
    assert len(references) == 7  # figures
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in references)
    assert not re.search(r"<(script|link|iframe|object|b)\b|@import|url\(", made.html)
    shown = " ".join(unescape(re.sub("<[^>]*>", "", made.html)).split())
    [verdict] = made.json["verdicts"]
    told = [text for c in verdict["criteria"] for text in (c["sentence"], c["outcome"], *c["withheld"])]
    labels = [*SWEEP.truths(), "onejump-2", "ppo-9", "missing", "failed", "diverged", "did not grow"]
    words = ["no space left on the device", "the loss was not finite", "<b>layer</b> 1", *PROVENANCE.values()]
    for text in (*told, *labels, *words, "--arms static,ppo & more", "test seeds0, 1, 2"):
        assert text in shown
    assert ">better<" not in made.html  # three seeds
    assert all(f"{run.loss:.4f}" in shown for run in made.runs if run.sound and run.purpose == "test")


def test_json_is_the_verdict(made: Made):
    [verdict] = made.json["verdicts"]
    for key, value in json.loads(json.dumps(judge(made.runs, SWEEP.point(), RECORD).as_dict())).items():
        assert verdict[key] == value
    finals = {row["name"]: row["val_loss"] for row in made.json["finals"]}
    assert finals == {run.name: run.loss if run.sound else None for run in made.runs}
    assert [arm["arm"] for arm in verdict["arms"]][:3] == ["static-1", "static-2", "tamiyo"]
    assert made.ids["parent"] in made.json["provenance"]["MLflow"]


def test_the_command_says_the_verdict_keeps_it_and_draws_it(made: Made):
    [verdict] = made.json["verdicts"]
    for criterion in verdict["criteria"]:
        assert f"{criterion['criterion']}: {criterion['outcome']}. {criterion['sentence']}" in made.out
        assert all(f"  - {reason}" in made.out for reason in criterion["withheld"])
    assert f"results: {made.folder / 'report.html'}, " in made.err
    kept = {file.path for file in MlflowClient(made.uri).list_artifacts(made.ids["parent"], "report")}
    assert kept == {f"report/{name}" for name in report.FILES}
    assert imread(made.folder / "report.png").shape[:2] == (560, 1700)


def test_a_section_for_each_grid_point_and_a_sweep_without_growth(client: MlflowClient, here: Path):
    points = [replace(FEW, grid=f'{{"budget.amount": {amount}}}') for amount in (500000, 1000000)]
    runs = [replace(run, name=f"{run.name}{point.grid}") for point in points for run in point.runs()]
    ids = log(client, here, runs, FEW.sweep(points=[point.point() for point in points]))
    code, _, err = ask("--sweep", ids["parent"])
    assert code == 0
    out = Path("reports", "a-sweep")
    assert f"results: {out}/report.html" in err
    assert "already holds" in refused()
    (out / "report.html").unlink()
    report.write_report(client, ids["parent"], out)  # over the older one
    text = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"budget.amount = {amount}" in text for amount in (500000, 1000000))
    assert "What the controller cost" not in text
    assert len(json.loads((out / "report.json").read_text(encoding="utf-8"))["verdicts"]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(made: Made, tmp_path: Path):
    page, picture = (made.folder / "report.html").as_uri(), tmp_path / "page.png"
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'me'}"]
    shot = [f"--screenshot={picture}", "--window-size=390,3000", "--hide-scrollbars", page]
    subprocess.run([*command, *shot], check=True, capture_output=True, timeout=120)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (3000, 390)
    assert min(pixels[i : i + 300].std() for i in range(0, 3000, 300)) > 0.01  # no band is blank


SPENT = {
    part: {"parameter_seconds": cost, "flops": 1.0}
    for part, cost in (("rates", 1e6), ("tuning", 5e5), ("controller", 1.5e6))
}


def paid(spent: dict[str, Any] | None, ppo: float, longest: float = 1.0, **point: Any) -> list[str]:
    """Of a controller that ends at a loss, beside a static size that ends at 1.2 after `longest` budgets."""
    cost = {"static-2": {"parameter_seconds": longest * BUDGET}}
    sweep = SyntheticSweep(statics={2: 1.2}, grown={"ppo": ppo}, cost=cost)
    point = sweep.point(controller={"trained_on": "text"}, spent=spent) | point
    return payback(judge(sweep.runs(), point, sweep.sweep()).trials)


@pytest.mark.parametrize(
    ("ppo", "longest", "told"),
    [
        (1.3, 4.0, r"need 2\.\d+M for that loss: a use saves 1\.\d+M, and the cost is paid back after 3 uses"),
        (1.1, 1.0, "none was trained longer: what a use saves cannot be said"),
        (1.1, 5.0, "need more than 5M for that loss: a use saves more than 4M, and .* after at most 1 use[.]"),
        (1.5, 1.0, "a use saves nothing"),
    ],
)
def test_after_how_many_uses_the_controller_has_paid(ppo, longest, told):
    cost, one = paid(SPENT, ppo, longest)
    assert "cost 3M parameter-seconds that no arm's budget contains: 1M for the search for rates, 500,000" in cost
    assert "forks, and episodes dropped or in flight" in cost
    assert re.search(told, one), one


@pytest.mark.parametrize("spent", [None, {}, SPENT | {"controller": None}, SPENT | {"rates": None}])
def test_a_cost_that_is_not_wholly_known_is_not_told(spent):
    [told] = paid(spent, 1.1)
    assert "is not known" in told
    assert paid(SPENT, 1.1, controller=None) == []


def test_the_range_of_losses_holds_every_end_that_is_compared(made: Made):
    trials, axes = judge(made.runs, SWEEP.point(), RECORD).trials, plt.figure().subplots()
    draw_losses(axes, trials, "tokens", legend=True)
    low, high = axes.get_ylim()
    sound = [run for run in trials.test_runs() if run.sound]
    ends = [run.loss for run in sound]
    assert low < min(ends) < max(ends) < high
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [*trials.test, "best static, annealed", "graft"]
    drawn = sum(len(np.atleast_1d(line.get_xdata())) for line in axes.lines if line.get_marker() == "^")
    assert drawn == sum(run.grafts for run in sound)


def test_a_mean_beyond_the_range_is_told_at_the_edge():
    far, axes = SyntheticSweep(statics={1: 9.0, 2: 1.2}), plt.figure().subplots()
    draw_differences(axes, judge(far.runs(), far.point(), far.sweep()).trials)
    assert [text.get_text() for text in axes.texts] == ["+7.800 ▸"]
    assert axes.get_xlim()[1] < 1


def test_a_label_has_one_look_and_its_controls_its_colour():
    arms = [f"arm{i}" for i in range(len(PALETTE) + 2)]
    followers = [f"{kind}:{arm}" for kind in ("static_final", "static_lrpath", "random") for arm in arms[:9]]
    labels = ["static-1", "static-2", *arms, *followers, "x:static-2"]
    found = looks({label: "static" if label.startswith("static-") else "tamiyo" for label in labels})
    assert len({tuple(look.values()) for look in found.values()}) == len(labels)
    assert found["static_final:arm3"]["color"] == found["arm3"]["color"]
    assert found["static_final:arm3"]["mfc"] == "white"


def test_a_store_that_is_not_there_is_not_made(here: Path):
    (here / "mlruns").mkdir()
    for uri in ("sqlite:///mlflow.db", "sqlite:///no/mlflow.db", "file:./no", "mlruns"):
        assert "there is no MLflow store" in refused("--tracking-uri", uri)
    for name, text in (("empty.db", b""), ("text.db", b"no database at all, only a text that is long enough")):
        (here / name).write_bytes(text)
        assert "there is no MLflow store" in refused("--tracking-uri", f"sqlite:///{name}")
        assert (here / name).read_bytes() == text
    assert {path.name for path in here.iterdir()} == {"mlruns", "empty.db", "text.db"}


@pytest.mark.parametrize("uri", ["nonsense://x", "http://", "http://me:secret@127.0.0.1:9", "http://127.0.0.1:{port}"])
def test_a_store_that_refuses_or_never_answers(here: Path, uri: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = refused("--tracking-uri", uri.format(port=server.getsockname()[1]))
    assert "cannot be read" in said
    assert "secret" not in said


def test_experiments_that_are_not_there_or_have_nothing_to_tell(client: MlflowClient, here: Path):
    client.create_run(client.create_experiment("esper-tinystories-old"), tags={"kind": "sweep"})
    assert "no such sweep with a sweep.json" in refused()
    assert "no such sweep with a sweep.json" in refused("Default")
    assert "Did you mean 'esper-tinystories-old'?" in refused(EXPERIMENT)
    failed = replace(FEW, edits={"static-1": {"status": "FAILED"}})
    log(client, here, failed.runs(), failed.sweep(), "lost")
    assert "no trial has finished" in refused()
    with pytest.raises(UserError, match="no trial has finished"):
        report.load(EXPERIMENT)
