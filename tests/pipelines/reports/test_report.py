"""`esper report`: what MLflow holds comes back as it was logged, is judged, and becomes a page that stands alone.

Real stores, SQLite files, filled by mlflow_sweep.py. One test opens the page in Chromium, where there is one.
Alone: `pytest tests/pipelines/reports/test_report.py` (a minute on two idle cores).
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
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.image import imread
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).parent))

import mlflow_sweep
from mlflow_sweep import Arm, Logged

from esper.pipelines import report
from esper.pipelines.common.statistics import Interval
from esper.pipelines.reports.content import Report, count, payback, short
from esper.pipelines.reports.envelope import EnvelopePoint
from esper.pipelines.reports.figures import PALETTE, draw_differences, draw_losses, looks, report_looks
from esper.pipelines.reports.store import find_experiment, find_sweep, open_store
from esper.pipelines.reports.tables import Tables
from esper.pipelines.reports.verdict import judge
from esper.platform.errors import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXPERIMENT = "esper-tinystories"
ARMS = (
    *(arm for arm in mlflow_sweep.GROWN if arm.label in ("onejump", "ppo", "random:tamiyo")),
    Arm("tamiyo", "tamiyo", 1, ((0.2, "ffn", "layer 0"), (0.35, "block", "<b>layer</b> 1")), 0.03),
    Arm("static_final:ppo", "static_final", None, layers=2),
)
CONTROLLER = {"checkpoint": "runs/ppo", "trained_on": "laws", "parameter_seconds": 3e6, "wall_seconds": 5400.0}
SWEEP = {
    "static": mlflow_sweep.STATIC[:2],
    "arms": ARMS,
    "seeds": (0, 1, 2),
    "tuning_seeds": (100,),
    "controller": CONTROLLER,
    "failed": ["onejump-test-seed2"],
    "diverged": ["random:tamiyo-test-seed1"],
    "missing": ["ppo-test-seed0"],
}


@dataclass
class Store:
    """A store on the disk, and what was put into it."""

    uri: str
    file: Path
    logged: Logged
    foreign: list[str]

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)


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
    file = Path(shutil.copy(empty, folder))
    client = MlflowClient(f"sqlite:///{file}")
    logged = mlflow_sweep.fill(client, folder / "artifacts", **SWEEP)
    foreign = mlflow_sweep.add_foreign(client, EXPERIMENT, logged.parent)
    mlflow_sweep.add_foreign(client, EXPERIMENT)
    old = client.create_run(client.get_run(logged.parent).info.experiment_id, tags={"kind": "sweep"}, run_name="old")
    client.set_terminated(old.info.run_id)
    return Store(f"sqlite:///{file}", file, logged, foreign)


@pytest.fixture(scope="module")
def tables(store: Store) -> Tables:
    """What `load` makes of it."""
    return report.load(EXPERIMENT, tracking_uri=store.uri)


@dataclass
class Made:
    """A report that the command wrote, and what it printed."""

    folder: Path
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))


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


FEW = {"static": mlflow_sweep.STATIC[:1], "arms": (), "seeds": (0,), "tuning_seeds": ()}


# -- load --------------------------------------------------------------------------------------------------------------


def test_load_gives_back_what_was_logged(store: Store, tables: Tables):
    trials = {name: trial for name, trial in store.logged.sweep["trials"].items() if trial["status"] != "missing"}
    assert set(tables.finals["name"]) == set(trials)
    for row in tables.finals.to_dict("records"):
        name, trial = row["name"], trials[row["name"]]
        assert (row["sweep"], row["run_id"]) == (store.logged.parent, store.logged.run_ids[name])
        assert all(row[key] == trial[key] for key in ("label", "arm", "seed", "purpose", "grid"))
        assert pd.isna(row["size"]) if trial["size"] is None else row["size"] == trial["size"]
        last = store.logged.points[name][-1]
        assert all(row[key] == last[key] for key in (*mlflow_sweep.LEDGER, "parameters"))
        summary = store.logged.summaries.get(name)
        assert row["status"] == ("FINISHED" if summary else "FAILED")
        assert row["diverged"] == (name in SWEEP["diverged"])
        if summary is None or row["diverged"]:
            assert pd.isna(row["val_loss"])
        else:
            assert row["val_loss"] == last["val_loss"]
        if summary is not None:
            assert row["layers"] == summary["layers"]
            assert all(row[key] == len(summary[key]) for key in ("grafts", "prunes", "rollbacks"))


def test_runs_that_are_no_trials_are_counted(made: Made):
    said = made.err
    assert "2 run(s) were skipped: no trials of a sweep" in said
    assert "1 run(s) were skipped: trials with tags that cannot be read" in said


def test_curves_hold_decisions_forks_and_ends(store: Store, tables: Tables):
    curves = tables.curves
    for name, run_id in store.logged.run_ids.items():
        own, summary = curves[curves["run_id"] == run_id], store.logged.summaries.get(name)
        decisions = own[own["kind"] == "decision"]
        for column in (*mlflow_sweep.LEDGER[:4], "parameter_seconds", "parameters", "val_loss", "budget_fraction"):
            if column in curves:
                assert decisions[column].to_list() == [point[column] for point in store.logged.points[name]]
        annealed = own[own["kind"] == "annealed"]
        forks = summary["annealed"] if summary else []
        ended = summary is not None and not summary["diverged"]
        if summary is not None:
            ends = [store.logged.points[name][-1]] if ended else []
            for column in ("steps", "tokens", "parameter_seconds", "parameters", "val_loss"):
                assert annealed[column].to_list() == [point[column] for point in [*forks, *ends]]
    assert pd.api.types.is_float_dtype(curves["val_loss"])


def test_the_timeline_holds_every_change(store: Store, tables: Tables):
    timeline = tables.timeline
    for name, summary in store.logged.summaries.items():
        own = timeline[timeline["run_id"] == store.logged.run_ids[name]]
        assert own["budget_fraction"].is_monotonic_increasing
        for event, key in (("graft", "grafts"), ("prune", "prunes"), ("rollback", "rollbacks")):
            rows = own[own["event"] == event].sort_values("optimizer_step").to_dict("records")
            records = sorted(summary[key], key=lambda record: record["optimizer_step"])
            assert len(rows) == len(records)
            for row, record in zip(rows, records, strict=True):
                known = record.get("removed") or f"{record['blueprint']} at {record['site']}"
                assert f"{row['blueprint']} at {row['site']}" == known
                if event == "graft":
                    assert row["outcome"] == record["outcome"]
                    assert row["parameters_after"] == record["parameters_after"]


def test_load_takes_all_sweeps_or_one(client: MlflowClient, here: Path):
    first = mlflow_sweep.fill(client, here / "a", name="first", **FEW)
    second = mlflow_sweep.fill(client, here / "a", name="second", **FEW)
    tables = report.load(EXPERIMENT)
    assert isinstance(tables, Tables)
    assert set(tables.finals["sweep"]) == {first.parent, second.parent}
    assert set(report.load(EXPERIMENT, sweep="first").finals["sweep"]) == {first.parent}
    assert set(report.load(EXPERIMENT, sweep=second.parent).finals["sweep"]) == {second.parent}
    opened, shown = open_store(None)
    experiment = find_experiment(opened, EXPERIMENT, shown)
    assert find_sweep(opened, experiment, EXPERIMENT, None).name == "second"  # the newest
    with pytest.raises(UserError, match=r"no sweep 'frist': there are first"):
        report.load(EXPERIMENT, sweep="frist")


def test_a_trial_that_was_run_again_counts_once(client: MlflowClient, here: Path):
    logged = mlflow_sweep.fill(client, here / "a", **FEW | {"seeds": (0, 1)})
    kept = logged.run_ids["static-1-test-seed0"]
    tags = client.get_run(kept).data.tags
    for status in ("FAILED", "KILLED"):
        again = client.create_run(client.get_run(kept).info.experiment_id, tags=tags, run_name="static-1-test-seed0")
        client.set_terminated(again.info.run_id, status)
    finals = report.load(EXPERIMENT).finals
    assert sorted(finals["run_id"]) == sorted(logged.run_ids.values())


# -- The report --------------------------------------------------------------------------------------------------------


class Reading(HTMLParser):
    """Texts, and whatever an element refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
        self.references += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def reading(made: Made) -> Reading:
    parsed = Reading()
    parsed.feed((made.folder / "report.html").read_text(encoding="utf-8"))
    return parsed


def test_the_page_refers_to_nothing_outside(made: Made, reading: Reading):
    text = (made.folder / "report.html").read_text(encoding="utf-8")
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in reading.references)
    assert len(reading.references) >= 9  # figures
    assert not {"script", "link", "iframe", "object"} & set(reading.tags)
    assert not re.search(r"@import|url\(", text)


def test_the_page_shows_every_label_seed_and_caveat(made: Made, store: Store, reading: Reading):
    shown = " ".join("".join(reading.texts).split())
    [verdict] = made.json["verdicts"]
    assert verdict["caveats"]  # 3 test seeds
    for text in (*store.logged.sweep["arms"], *verdict["caveats"], *(c["outcome"] for c in verdict["criteria"])):
        assert text in shown
    for seed in store.logged.sweep["seeds"]:
        assert f"seed {seed}" in shown
    for criterion in verdict["criteria"]:
        for text in (criterion["sentence"], *criterion["details"], *criterion["withheld"]):
            assert text in shown
    assert "onejump-test-seed2" in shown
    assert "no space left on the device" in shown
    assert "ppo-test-seed0" in shown
    assert "random:tamiyo-test-seed1" in shown
    assert "skipped" in shown
    assert all(text in shown for text in mlflow_sweep.PROVENANCE.values())
    assert "<b>layer</b> 1" in shown  # as text
    assert "b" not in reading.tags
    losses = [summary["val_loss"] for name, summary in store.logged.summaries.items() if "tamiyo-test-seed0" in name]
    assert all(f"{loss:.4f}" in shown for loss in losses)


def test_json_is_the_verdict(made: Made, store: Store, tables: Tables):
    told = made.json
    sweep = store.logged.sweep
    expected = [judge(tables, point, sweep=sweep).as_dict() for point in sweep["points"]]
    assert told["verdicts"] == json.loads(json.dumps(expected))
    assert len(told["finals"]) == len(store.logged.run_ids)
    by_name = {row["name"]: row for row in told["finals"]}
    assert by_name["onejump-test-seed2"]["val_loss"] is None
    name = "tamiyo-test-seed0"
    assert by_name[name]["val_loss"] == store.logged.summaries[name]["val_loss"]
    assert store.logged.parent in told["provenance"]["MLflow"]


def test_markdown_has_the_same_tables_and_the_picture(made: Made, store: Store):
    text = (made.folder / "report.md").read_text(encoding="utf-8")
    assert "![" in text
    assert "](report.png)" in text
    for label in store.logged.sweep["arms"]:
        assert f"| {label} |" in text
    assert "<b>" not in text.replace("\\<b", "")
    heights = imread(made.folder / "report.png").shape
    assert heights[0] > 800
    assert heights[1] == 1500


def test_it_is_kept_with_the_sweep(made: Made, store: Store):
    kept = {file.path for file in store.client.list_artifacts(store.logged.parent, "report")}
    assert kept == {f"report/{name}" for name in report.FILES}


def test_the_command_says_the_verdict_and_where_it_is(made: Made):
    [verdict] = made.json["verdicts"]
    for criterion in verdict["criteria"]:
        assert f"{criterion['criterion']}: {criterion['outcome']}. {criterion['sentence']}" in made.out
    efficient = verdict["criteria"][1]
    assert all(f"  - {reason}" in made.out for reason in efficient["withheld"])
    assert efficient["details"]
    assert not any(detail in made.out for detail in efficient["details"])
    assert f"results: {made.folder / 'report.html'}, " in made.err


def test_a_section_for_each_grid_point_and_a_sweep_without_growth(client: MlflowClient, here: Path):
    grids = [{"budget.amount": 5e5}, {"budget.amount": 1e6}]
    logged = mlflow_sweep.fill(client, here / "a", grids=grids, rates_tuned=False, **FEW)
    code, _, err = ask("--sweep", logged.parent)
    assert code == 0
    assert "results: reports/sweep-20260101-120000/report.html" in err
    out = Path("reports", "sweep-20260101-120000")
    assert "already holds" in refused()
    (out / "report.html").unlink()
    assert report.write_report(client, logged.parent, out) == out / "report.html"  # over the older one
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "budget.amount = 500000" in text
    assert "budget.amount = 1000000" in text
    assert "What the policy cost" not in text
    assert len(json.loads((out / "report.json").read_text(encoding="utf-8"))["verdicts"]) == 2


def test_a_budget_of_steps(client: MlflowClient, here: Path):
    few = FEW | {"static": mlflow_sweep.STATIC[:2], "arms": mlflow_sweep.GROWN[:1], "seeds": (0, 1)}
    logged = mlflow_sweep.fill(client, here / "a", budget=("steps", 40), **few)
    report.write_report(client, logged.parent, here / "out")
    text = (here / "out" / "report.html").read_text(encoding="utf-8")
    assert "at an equal budget of 40 steps" in text
    assert "at 40 steps no grown arm ends lower" in text
    [verdict] = json.loads((here / "out" / "report.json").read_text(encoding="utf-8"))["verdicts"]
    [own] = [c for c in verdict["claims"] if (c["opponent"], c["axis"]) == ("envelope", "tokens")]
    assert own["seeds"] == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it(made: Made, tmp_path: Path, width: int):
    page, picture = (made.folder / "report.html").as_uri(), tmp_path / "page.png"
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'me'}"]
    shot = [f"--screenshot={picture}", f"--window-size={width},3000", "--hide-scrollbars", page]
    subprocess.run([*command, *shot], check=True, capture_output=True, timeout=120)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (3000, width)
    bands = [band.std() for band in (pixels[i : i + 300] for i in range(0, 3000, 300))]
    assert min(bands) > 0.01  # no band is blank
    dumped = subprocess.run([*command, "--dump-dom", page], check=True, capture_output=True, text=True, timeout=120)
    for text in ("Efficiency", "static_final:ppo", "What the data cannot say", "Where this is from"):
        assert text in dumped.stdout


# -- What the policy cost ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(store: Store) -> Report:
    """The report before it is written."""
    client, shown = open_store(store.uri)
    experiment = find_experiment(client, EXPERIMENT, shown)
    sweep = find_sweep(client, experiment, EXPERIMENT, store.logged.parent)
    return report.build(client, shown, experiment, EXPERIMENT, sweep)


def paid(whole: Report, controller: dict[str, Any] | None, losses: list[tuple[float, float]], ppo: float) -> list[str]:
    """For an envelope of (cost, loss) and a policy's mean final loss."""
    whole = replace(whole, sweep=replace(whole.sweep, record=whole.record | {"controller": controller}))
    [section] = whole.sections
    rows = tuple(replace(row, loss=Interval(ppo, 0.01)) for row in section.verdict.rows if row.arm == "ppo")
    points = tuple(EnvelopePoint(cost, loss, 1) for cost, loss in losses)
    verdict = replace(section.verdict, rows=rows, envelope={"parameter_seconds": points})
    return payback(whole, replace(section, verdict=verdict))


@pytest.mark.parametrize(
    ("losses", "ppo", "told"),
    [
        ([(5e5, 1.6), (1e6, 1.5), (4e6, 1.4)], 1.45, "needs 2,000,000 .* saves 999,900, .* paid after 4 uses"),
        ([(5e5, 1.6), (1e6, 1.5)], 1.45, "none was trained longer, .* cannot be said"),
        ([(5e5, 1.6), (4e6, 1.5)], 1.45, "saves more than 3,000,000, .* at most 2 uses"),
        ([(5e5, 1.6), (8e5, 1.4)], 1.45, "never pays"),
        ([(5e5, 1.4), (8e5, 1.3)], 1.45, "no use saves anything"),
    ],
)
def test_after_how_many_uses_the_policy_has_paid(whole: Report, losses, ppo, told):
    cost, one = paid(whole, CONTROLLER, losses, ppo)
    assert "trained on loss laws for 3,000,000 parameter-seconds in 5,400 s" in cost
    assert re.search(told, one), one


def test_a_policy_that_was_given_has_no_known_cost(whole: Report):
    given = {"checkpoint": "x", "trained_on": "given", "parameter_seconds": None, "wall_seconds": None}
    [told] = paid(whole, given, [(1e6, 1.5)], 1.45)
    assert "cannot be said" in told
    assert paid(whole, None, [(1e6, 1.5)], 1.45) == []


def test_each_grid_point_tells_what_its_own_controller_cost(whole: Report):
    [section] = whole.sections
    own = replace(section, point=section.point | {"controller": CONTROLLER | {"parameter_seconds": 7e6}})
    assert "for 7,000,000 parameter-seconds" in payback(whole, own)[0]
    assert payback(whole, replace(section, point=section.point | {"controller": None})) == []


# -- Figures -----------------------------------------------------------------------------------------------------------


def test_lines_join_a_fork_with_the_next_and_the_range_is_that_of_the_ends(whole: Report):
    """Whatever the spec says of cooldowns: a sweep may have given them to some runs only."""
    [section] = whole.sections
    _, axes = plt.subplots()
    draw_losses(axes, section, "tokens", report_looks(whole))
    lines = dict(zip(section.labels, axes.lines, strict=False))
    assert all(len(list(lines[label].get_xdata())) == len(mlflow_sweep.FORKS) + 1 for label in section.labels)
    envelope = axes.lines[len(lines) :]
    assert {line.get_linestyle() for line in envelope} == {"-", ":"}
    complete = [point.cost for point in section.verdict.envelope["tokens"] if point.complete]
    [solid] = [line for line in envelope if line.get_linestyle() == "-"]
    assert list(solid.get_xdata())[-len(complete) :] == complete
    ends = [loss for row in section.verdict.rows if row.arm != "static" for loss in row.losses.values()]
    low, high = axes.get_ylim()
    assert low < min(ends) < max(ends) < high
    assert high - low < 2 * (max(ends) - min(ends))
    plt.close()


def test_a_mean_beyond_the_range_is_told_at_the_edge(whole: Report):
    [section] = whole.sections
    far = [replace(row, losses=dict.fromkeys(row.losses, 9.0)) for row in section.verdict.rows[:1]]
    rows = (*far, *section.verdict.rows[1:])
    assert far[0].label == "static-1"
    _, axes = plt.subplots()
    draw_differences(axes, replace(section, verdict=replace(section.verdict, rows=rows)), report_looks(whole))
    assert [text.get_text()[-1] for text in axes.texts] == ["▸"]
    assert axes.get_xlim()[1] < 1
    plt.close()


# -- Small things ------------------------------------------------------------------------------------------------------


def test_a_label_has_one_look_and_its_controls_its_colour():
    arms = [f"arm{i}" for i in range(len(PALETTE) + 2)]
    followers = [f"{kind}:{arm}" for kind in ("static_final", "static_lrpath", "random") for arm in arms]
    labels = ["static-1", "static-2", *arms, *followers, "x:static-2"]
    kinds = {label: "static" if label.startswith("static-") else "tamiyo" for label in labels}
    found = looks(labels, kinds)
    assert len({(look.color, look.marker, look.hollow, look.line) for look in found.values()}) == len(labels)
    assert found["static_final:arm3"].color == found["arm3"].color
    assert found["static_final:arm3"].hollow
    assert found["arm0"].color == found[f"arm{len(PALETTE)}"].color
    assert found["arm0"].marker != found[f"arm{len(PALETTE)}"].marker
    assert found["static_final:arm3"].marker != found["static_lrpath:arm3"].marker != found["random:arm3"].marker


def test_numbers():
    assert [short(x) for x in (None, 0.0, 12.3456, 1234, 15_900_672, 2.9e12)] == [
        *("–", "0", "12.35", "1,234", "15.9M", "2.9T")
    ]
    assert [count(x) for x in (1e6, 1_234_567, 62.5002)] == ["1,000,000", "1,235,000", "62.5"]


# -- Bad input ---------------------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_is_not_made(here: Path):
    assert "there is no MLflow database" in refused()
    assert "there is no MLflow database" in refused("--tracking-uri", "sqlite:///no/mlflow.db")
    assert "there is no MLflow folder" in refused("--tracking-uri", "file:./mlruns")
    assert "there is no MLflow folder" in refused("--tracking-uri", "mlruns")
    (here / "mlruns").mkdir()
    assert "holds no MLflow experiments" in refused("--tracking-uri", str(here / "mlruns"))
    for name, text in (("empty.db", b""), ("text.db", b"no database at all, only a text that is long enough")):
        (here / name).write_bytes(text)
        assert "is not a database of MLflow" in refused("--tracking-uri", f"sqlite:///{name}")
        assert (here / name).read_bytes() == text
    with sqlite3.connect(here / "other.db") as other:
        other.execute("CREATE TABLE other (x)")
    other.close()
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


def test_experiments_that_are_not_there(client: MlflowClient, here: Path):
    client.create_experiment("esper-tinystories-old")
    said = refused()
    assert "no experiment 'esper-tinystories': the nearest are esper-tinystories-old." in said
    assert "holds no sweep" in refused("esper-tinystories-old")
    gone = client.create_experiment("gone")
    client.delete_experiment(gone)
    said = refused("gone")
    [command] = re.findall(r"`(.+)`", said)
    assert "mlflow experiments restore --experiment-id" in command
    client.create_run(client.create_experiment("foreign"), run_name="train-1")
    assert "holds no sweep" in refused("foreign")
    with pytest.raises(UserError, match="holds no sweep"):
        report.load("foreign")


def test_sweeps_that_have_nothing_to_tell(client: MlflowClient, here: Path):
    mlflow_sweep.fill(client, here / "a", name="lost", failed=["static-1-test-seed0"], **FEW)
    assert "sweep 'lost' has no finished runs" in refused()
    with pytest.raises(UserError, match="has no finished runs"):
        report.load(EXPERIMENT)
    experiment = client.create_experiment("olden")
    old = client.create_run(experiment, tags={"kind": "sweep"}, run_name="old").info.run_id
    assert "no sweep.json" in refused("olden")
    assert "no sweep.json" in refused("olden", "--sweep", old)
    assert "no sweep 'new': there are old" in refused("olden", "--sweep", "new")
    client.log_dict(old, {"points": []}, "sweep.json")
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    assert "already holds" in refused("olden", "--out", str(here / "full"))
