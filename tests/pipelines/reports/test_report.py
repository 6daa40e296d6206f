"""`esper report`: what MLflow holds comes back as it was logged, is judged, and becomes a page that stands alone.

Real stores, SQLite files, filled by synthetic_sweeps.py. One test opens the page in Chromium, where there is one.
"""

import contextlib
import io
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
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
from esper.pipelines.reports import sections
from esper.pipelines.reports.figures import PALETTE, draw_differences, draw_losses, looks
from esper.pipelines.reports.runs import AXES, Run, Tables
from esper.pipelines.reports.store import Sweep
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


class Store(NamedTuple):
    uri: str
    runs: list[Run]
    ids: dict[str, str]


class Made(NamedTuple):
    """A report that the command wrote, and what it printed."""

    folder: Path
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))

    @property
    def html(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")


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
def store(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A sweep with a failed, a diverged and a missing trial, beside older and foreign runs."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{shutil.copy(empty, folder)}"
    client, runs = MlflowClient(uri), SWEEP.runs()
    ids = log(client, folder, runs, RECORD)
    experiment = client.get_run(ids["parent"]).info.experiment_id
    trial = {"kind": "trial", "arm": "static", "label": "static-1", "seed": "none", "purpose": "test", "grid": "{}"}
    for tags in ({}, {"arm": "static", "seed": "0"}, trial, trial | {"seed": "7"}):
        tags = tags | {"mlflow.parentRunId": ids["parent"]}
        client.set_terminated(client.create_run(experiment, tags=tags, run_name="<script>1</script>").info.run_id)
    lacking = client.create_run(experiment, tags=tags | {"seed": "8"}, run_name="old").info.run_id
    client.log_dict(lacking, {key: value for key, value in runs[0].summary.items() if key != "flops"}, "summary.json")
    client.set_terminated(lacking)
    client.create_run(experiment, tags={"kind": "sweep"}, run_name="newer, without a sweep.json")
    return Store(uri, runs, ids)


@pytest.fixture(scope="module")
def made(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made") / "report"
    code, out, err = ask("--tracking-uri", store.uri, "--out", str(folder))
    assert code == 0, err
    return Made(folder, out, err)


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


# -- load --------------------------------------------------------------------------------------------------------------


def test_load_gives_back_what_was_logged(store: Store):
    tables = report.load(EXPERIMENT, tracking_uri=store.uri)
    finals = tables.finals.set_index("name")
    assert set(finals.index) == {run.name for run in store.runs}
    for run in store.runs:
        row, own = finals.loc[run.name], tables.curves[tables.curves["run_id"] == store.ids[run.name]]
        assert (row["sweep"], row["run_id"]) == (store.ids["parent"], store.ids[run.name])
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
    [*events] = tables.timeline[tables.timeline["run_id"] == store.ids["ppo-0"]].to_dict("records")
    told = [(e["event"], e["blueprint"], e["site"], e["outcome"]) for e in events]
    assert told[0] == ("graft", "block", "<b>layer</b> 1", "pruned")
    assert [e["event"] for e in events] == ["graft", "prune", "graft", "rollback"]
    assert told[-1][:3] == ("rollback", "ffn", "layer 1")


def test_what_a_run_lacks_is_told(made: Made):
    for told in (
        "2 runs left out: no trials of a sweep",
        "1 run left out: trials with tags that cannot be read",
        "1 run left out: finished without a summary.json",
        "1 run left out: their summary.json lacks flops",
    ):
        assert f"note    {told}" in made.err
        assert told in made.html.replace("&#39;", "'")


def test_load_takes_all_sweeps_or_one(client: MlflowClient, here: Path):
    first, second = (log(client, here, FEW.runs(), FEW.sweep(), name)["parent"] for name in ("first", "second"))
    tables = report.load(EXPERIMENT)
    assert isinstance(tables, Tables)
    assert set(tables.finals["sweep"]) == {first, second}
    assert set(report.load(EXPERIMENT, sweep="first").finals["sweep"]) == {first}
    assert set(report.load(EXPERIMENT, sweep=second).finals["sweep"]) == {second}
    assert "sweep   second of" in ask()[2]  # the newest
    with pytest.raises(UserError, match=r"no sweep 'frist': there are first"):
        report.load(EXPERIMENT, sweep="frist")


# -- The report --------------------------------------------------------------------------------------------------------


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
    assert all(f"{run.loss:.4f}" in shown for run in SWEEP.runs() if run.sound and run.purpose == "test")


def test_json_is_the_verdict(made: Made, store: Store):
    expected = judge(store.runs, SWEEP.point(), RECORD).as_dict()
    [verdict] = made.json["verdicts"]
    for key, value in json.loads(json.dumps(expected)).items():
        assert verdict[key] == value
    finals = {row["name"]: row for row in made.json["finals"]}
    assert finals["onejump-2"]["val_loss"] is None
    [tamiyo] = [run for run in store.runs if run.name == "tamiyo-0"]
    assert finals["tamiyo-0"]["val_loss"] == tamiyo.loss
    assert [arm["arm"] for arm in verdict["arms"]][:3] == ["static-1", "static-2", "tamiyo"]
    assert store.ids["parent"] in made.json["provenance"]["MLflow"]


def test_the_command_says_the_verdict_keeps_it_and_draws_it(made: Made, store: Store):
    [verdict] = made.json["verdicts"]
    for criterion in verdict["criteria"]:
        assert f"{criterion['criterion']}: {criterion['outcome']}. {criterion['sentence']}" in made.out
        assert all(f"  - {reason}" in made.out for reason in criterion["withheld"])
    assert f"results: {made.folder / 'report.html'}, " in made.err
    kept = {file.path for file in MlflowClient(store.uri).list_artifacts(store.ids["parent"], "report")}
    assert kept == {f"report/{name}" for name in report.FILES}
    assert imread(made.folder / "report.png").shape[:2] == (560, 1700)


def test_a_section_for_each_grid_point_and_a_sweep_without_growth(client: MlflowClient, here: Path):
    grids = [f'{{"budget.amount": {amount}}}' for amount in (500000, 1000000)]
    points = [replace(FEW, grid=grid) for grid in grids]
    runs = [
        replace(run, name=f"{run.name}{grid}")
        for point, grid in zip(points, grids, strict=True)
        for run in point.runs()
    ]
    ids = log(client, here, runs, FEW.sweep(points=[point.point() for point in points]))
    code, _, err = ask("--sweep", ids["parent"])
    assert code == 0
    out = Path("reports", "a-sweep")
    assert f"results: {out}/report.html" in err
    assert "already holds" in refused()
    (out / "report.html").unlink()
    assert report.write_report(client, ids["parent"], out) == out / "report.html"  # over the older one
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


# -- What the controller cost ------------------------------------------------------------------------------------------

SPENT = {
    part: {"parameter_seconds": cost, "flops": 1.0}
    for part, cost in (("rates", 1e6), ("tuning", 5e5), ("controller", 1.5e6))
}


def paid(spent: dict[str, Any] | None, ppo: float, longest: float = 1.0, **point: Any) -> list[str]:
    """Of a controller that ends at a loss, beside a static size that ends at 1.2 after `longest` budgets."""
    cost = {"static-2": {"parameter_seconds": longest * BUDGET}}
    sweep = SyntheticSweep(statics={2: 1.2}, grown={"ppo": ppo}, cost=cost)
    point = sweep.point(controller={"trained_on": "text"}, spent=spent) | point
    verdict = judge(sweep.runs(), point, sweep.sweep())
    whole = sections.Report(Sweep("store", EXPERIMENT, "1", "id", "a-sweep", sweep.sweep()), [verdict], [], [])
    return sections.payback(whole, verdict.trials)


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


@pytest.mark.parametrize("spent", [None, {}, SPENT | {"controller": None}, {"rates": None, **SPENT}])
def test_a_cost_that_is_not_wholly_known_is_not_told(spent):
    spent = spent and {**spent, **({"rates": None} if spent.get("controller") else {})}
    [told] = paid(spent, 1.1)
    assert "is not known" in told
    assert paid(SPENT, 1.1, controller=None) == []


# -- Figures -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def axes() -> Iterator[Any]:
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_the_range_of_losses_holds_every_end_that_is_compared(axes, store: Store):
    trials = judge(store.runs, SWEEP.point(), RECORD).trials
    draw_losses(axes, trials, "tokens", legend=True)
    low, high = axes.get_ylim()
    ends = [run.loss for label in trials.test for run in trials.sound(label).values()]
    assert low < min(ends) < max(ends) < high
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [*trials.test, "best static, annealed", "graft"]
    grafts = sum(run.grafts for label in trials.test for run in trials.sound(label).values())
    assert sum(len(np.atleast_1d(line.get_xdata())) for line in axes.lines if line.get_marker() == "^") == grafts


def test_a_mean_beyond_the_range_is_told_at_the_edge(axes):
    far = SyntheticSweep(statics={1: 9.0, 2: 1.2})
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


# -- Bad input ---------------------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_is_not_made(here: Path):
    (here / "mlruns").mkdir()
    for uri in (None, "sqlite:///no/mlflow.db", "file:./no", "mlruns"):
        assert "there " in refused(*(("--tracking-uri", uri) if uri else ()))
    for name, text in (("empty.db", b""), ("text.db", b"no database at all, only a text that is long enough")):
        (here / name).write_bytes(text)
        assert "is not a database of MLflow" in refused("--tracking-uri", f"sqlite:///{name}")
        assert (here / name).read_bytes() == text
    with contextlib.closing(sqlite3.connect(here / "other.db")) as other:
        other.execute("CREATE TABLE other (x)")
    assert "is not a database of MLflow" in refused("--tracking-uri", "sqlite:///other.db")
    assert {path.name for path in here.iterdir()} == {"mlruns", "empty.db", "text.db", "other.db"}


@pytest.mark.parametrize(
    "uri", ["nonsense://x", "http://", "http://127.0.0.1:9", "postgresql://me:secret@127.0.0.1:9/x"]
)
def test_a_store_that_refuses(here: Path, uri: str):
    said = refused("--tracking-uri", uri)
    assert "cannot be read" in said
    assert "secret" not in said


def test_a_server_that_never_answers(here: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = refused("--tracking-uri", f"http://127.0.0.1:{server.getsockname()[1]}")
    assert "cannot be read" in said


def test_experiments_that_are_not_there_or_have_nothing_to_tell(client: MlflowClient, here: Path):
    client.create_experiment("esper-tinystories-old")
    assert "holds no sweep" in refused()
    assert "no experiment 'esper-tinystories': the nearest are esper-tinystories-old." in refused(EXPERIMENT)
    assert "holds no sweep" in refused("esper-tinystories-old")
    client.delete_experiment(client.create_experiment("gone"))
    assert "mlflow experiments restore --experiment-id" in refused("gone")
    failed = replace(FEW, edits={"static-1": {"status": "FAILED"}})
    log(client, here, failed.runs(), failed.sweep(), "lost")
    assert "no trial has finished" in refused()
    with pytest.raises(UserError, match="no trial has finished"):
        report.load(EXPERIMENT)
    old = client.create_run(client.create_experiment("olden"), tags={"kind": "sweep"}, run_name="old").info.run_id
    assert "no sweep in 'olden' has a sweep.json" in refused("olden")
    assert f"no sweep {old} has a sweep.json" in refused("olden", "--sweep", old)
    assert "no sweep 'new': there are old" in refused("olden", "--sweep", "new")
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    assert "already holds" in refused("olden", "--out", str(here / "full"))
