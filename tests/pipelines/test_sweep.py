"""`esper sweep` end to end, with Ray Tune and a real MLflow store: stages, deaths, resuming, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from esper.pipelines import report, sweep
from esper.pipelines.sweeps import log, stages
from esper.platform.tracking import Tracker
from tests.mlflow_servers import free_port, mlflow_server

pytestmark = pytest.mark.usefixtures("one_ray")
ROOT = Path(__file__).parents[2]
ARMS = "static,onejump,gradual,tamiyo,random:gradual,static_final:onejump,static_lrpath:onejump"


def states(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text())


def children(client, out: Path) -> list:
    """The sweep's trials in MLflow."""
    store = client()
    experiment = store.get_experiment_by_name("esper-tinystories").experiment_id
    parents = store.search_runs(
        [experiment], f"tags.`esper.key` = '{json.loads((out / 'plan.json').read_text())['key']}'"
    )
    assert len(parents) == 1
    return store.search_runs([experiment], f"tags.mlflow.parentRunId = '{parents[0].info.run_id}'")


def check_tracked(client, out: Path) -> None:
    """Exactly the planned runs, all finished, every point once."""
    planned = states(out)["trials"]
    runs = children(client, out)
    assert sorted(run.info.run_name for run in runs) == sorted(planned)
    store = client()
    for run in runs:
        assert run.info.status == "FINISHED"
        summary = json.loads((out / "trials" / run.info.run_name / "summary.json").read_text())
        for key in ("val_loss", "parameter_seconds", "learning_rate"):
            points = {point.step: point.value for point in store.get_metric_history(run.info.run_id, key)}
            assert len(store.get_metric_history(run.info.run_id, key)) == len(points) == len(summary["val_curve"])
            assert points == {int(p["steps"]): pytest.approx(p[key]) for p in summary["val_curve"]}
        grid = store.get_metric_history(run.info.run_id, "grid/val_loss")
        assert [point.step for point in grid] == list(range(9))


def test_every_stage(tiny, client, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(stages, "ROUNDS", 2)  # of the search for rates, which has tests of its own
    out = tmp_path / "sweep"
    flags = ["--arms", ARMS, "--sizes", "1,2", "--seeds", "1", "--tuning-seeds", "1", "--tune-lr"]
    assert sweep.main([*flags, *tiny, "--out", str(out)]) == 0
    printed = capfd.readouterr().err
    for part in ("rates  ", "tuning ", "test   ", "follow ", "done", "left", "mean loss so far", "viewStateShareKey"):
        assert part in printed
    assert "WARNING" not in printed

    found = states(out)
    point = found["points"][0]
    assert {trial["status"] for trial in found["trials"].values()} == {"done"}
    assert point["size"] in (1, 2)
    assert point["schedule"] in ("onejump", "gradual")
    assert set(point["rates"]) == {"1", "2"}
    tests = [trial for trial in found["trials"].values() if trial["purpose"] == "test"]
    assert Counter(trial["label"] for trial in tests) == dict.fromkeys(
        [
            "static-1",
            "static-2",
            "onejump",
            "gradual",
            "tamiyo",
            "random:gradual",
            "static_final:onejump",
            "static_lrpath:onejump",
        ],
        1,
    )
    summaries = {(s["arm"], s["seed"]): s for s in json.loads((out / "summary.json").read_text())}
    # Arms are paired: equal seeds see the same batches and start from the same weights.
    first = {summaries[arm, 0]["val_curve"][0]["val_loss"] for arm in ("static-1", "onejump", "gradual", "tamiyo")}
    assert len(first) == 1
    assert summaries["static_final:onejump", 0]["shape"] == summaries["onejump", 0]["shape"]
    assert summaries["static_lrpath:onejump", 0]["layers"] == point["size"]
    grafted = [graft["blueprint"] for graft in summaries["gradual", 0]["grafts"]]
    assert sorted(g["blueprint"] for g in summaries["random:gradual", 0]["grafts"]) == sorted(grafted) != []
    assert len(summaries["static-1", 0]["annealed"]) == 2

    check_tracked(client, out)
    runs = children(client, out)
    by_name = {run.info.run_name: run for run in runs}
    run = by_name["static_final.of.onejump-seed0"]
    assert {key: run.data.tags[key] for key in ("arm", "label", "size", "seed", "purpose", "grid", "preset")} == {
        "arm": "static_final",
        "label": "static_final:onejump",
        "size": str(summaries["onejump", 0]["layers"]),
        "seed": "0",
        "purpose": "test",
        "grid": "{}",
        "preset": "tiny",
    }
    assert len({key for run in runs for key in run.data.metrics}) <= 25
    assert run.inputs.dataset_inputs
    artifacts = {entry.path for entry in client().list_artifacts(run.info.run_id)}
    assert artifacts == {"summary.json", "spec.json"}
    parent = run.data.tags["mlflow.parentRunId"]
    assert client().get_run(parent).data.tags["kind"] == "sweep"
    assert {entry.path for entry in client().list_artifacts(parent)} >= {"spec.json", "sweep.json", "report"}

    assert (out / "report" / "report.html").is_file()
    tables = report.load("esper-tinystories")
    assert set(tables.finals["label"]) == {trial["label"] for trial in found["trials"].values()}

    # Nothing is left to do: a resume runs nothing, and doubles nothing.
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/summary.json")}
    assert sweep.main(["--resume", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("trials/*/summary.json")} == before
    check_tracked(client, out)

    # What was chosen stays chosen: a trial that failed then is not tried again, under runs that rest on the choice.
    (out / "trials" / "gradual-seed2000000" / "summary.json").unlink()
    assert sweep.main(["--resume", str(out)]) == 1
    assert states(out)["points"] == found["points"]
    assert "failed  gradual-seed2000000: it has not been run to its end" in capfd.readouterr().err


@pytest.mark.slow
def test_a_grid_compares_at_each_point(tiny, client, tmp_path):
    out = tmp_path / "sweep"
    flags = ["--arms", "static,onejump", "--grid", "budget.amount=24,40", "--grid", "host.n_head=1,2"]
    assert sweep.main([*flags, *tiny, "--out", str(out)]) == 0
    found = states(out)
    assert len(found["points"]) == 4
    assert len(found["trials"]) == 8
    runs = children(client, out)
    assert Counter(run.data.tags["grid"] for run in runs) == dict.fromkeys([p["grid"] for p in found["points"]], 2)
    steps = {run.data.tags["grid"]: run.data.metrics["steps"] for run in runs}
    assert all(steps[grid] == json.loads(grid)["budget.amount"] for grid in steps)


def test_a_trial_that_fails_is_named_and_the_others_go_on(tiny, client, tmp_path, capfd):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"at": 0.5, "blueprint": "ffn", "site": "h7.ffn"}]))
    out = tmp_path / "sweep"
    flags = ["--arms", "static,schedule,static_final:schedule", "--schedule", str(plan)]
    assert sweep.main([*flags, *tiny, "--out", str(out)]) == 1
    assert [s["arm"] for s in json.loads((out / "summary.json").read_text())] == ["static-1"]
    printed = capfd.readouterr().err
    assert "failed  schedule-seed0: unknown site for ffn in the schedule 'h7.ffn'" in printed
    assert "failed  static_final.of.schedule-seed0: schedule has no sound run of this seed to follow" in printed
    assert {run.info.run_name: run.info.status for run in children(client, out)} == {
        "static-1-seed0": "FINISHED",
        "schedule-seed0": "FAILED",
    }
    assert states(out)["trials"]["static_final.of.schedule-seed0"]["status"] == "failed"
    (out / "inputs" / "schedule.json").write_text("[]")  # mended: the resumed sweep runs what is missing
    assert sweep.main(["--resume", str(out)]) == 0
    assert sorted(run.info.run_name for run in children(client, out)) == [
        "schedule-seed0",
        "static-1-seed0",
        "static_final.of.schedule-seed0",
    ]


def command(out: Path, *flags: str) -> subprocess.Popen:
    arguments = [sys.executable, str(ROOT / "pipelines" / "sweep.py"), *flags]
    with (out.parent / "stderr").open("a") as stderr:
        return subprocess.Popen(arguments, stderr=stderr, start_new_session=True)


def wait_for(what, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


@pytest.fixture
def longer(tiny):
    """Trials that take a few seconds."""
    return [*tiny, "--set", "budget.amount=2000"]


def test_deaths_of_a_trial_and_of_the_driver(longer, client, tmp_path):
    out = tmp_path / "sweep"
    process = command(out, "--arms", "static,onejump", "--seeds", "2", *longer, "--out", str(out))
    try:
        wait_for(lambda: trial_processes(process.pid) and list(out.glob("saves/*.safetensors")))
        os.kill(trial_processes(process.pid)[0], signal.SIGKILL)
        wait_for(lambda: list(out.glob("trials/*/summary.json")))
        assert "its process died; it is started again" in (tmp_path / "stderr").read_text()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < len(list(out.glob("trials/*/summary.json"))) < 4
    assert sweep.main(["--resume", str(out)]) == 0
    assert {trial["status"] for trial in states(out)["trials"].values()} == {"done"}
    check_tracked(client, out)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(longer, client, tmp_path):
    out = tmp_path / "sweep"
    process = command(out, "--arms", "static,tamiyo", *longer, "--out", str(out))
    try:
        wait_for(lambda: list(out.glob("saves/*.safetensors")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert f"go on with: esper sweep --resume {out}" in (tmp_path / "stderr").read_text()
    assert sweep.main(["--resume", str(out)]) == 0
    check_tracked(client, out)


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_sweep(longer, tmp_path, monkeypatch):
    folder = tmp_path / "server"
    folder.mkdir()
    out = tmp_path / "sweep"
    with mlflow_server(folder, f"sqlite:///{folder}/server.db") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        process = command(out, "--arms", "static,onejump", *longer, "--out", str(out))
        try:
            wait_for(lambda: list(out.glob("saves/*.safetensors")))
            server.kill()
            time.sleep(20)
            server.start()
            assert process.wait(240) == 0
        finally:
            process.kill()
        check_tracked(lambda: MlflowClient(server.uri), out)
        printed = (tmp_path / "stderr").read_text()
        assert printed.count("takes nothing at the moment") == printed.count("is back") == 1
        assert f"compare: {server.uri}" in printed


def test_a_server_that_never_comes(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(log, "CLOSING_SECONDS", 3)
    out = tmp_path / "sweep"
    assert sweep.main(["--arms", "static", *tiny, "--out", str(out)]) == 0
    printed = capfd.readouterr().err
    assert (
        f"MLflow was not to be had: send it everything, and get the report, with: esper sweep --resume {out}" in printed
    )
    assert "waiting for MLflow to take the last of the trials, 3 s for each at most" in printed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert sweep.main(["--resume", str(out)]) == 0
    check_tracked(lambda: MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), out)


@pytest.mark.slow
def test_a_controller_trained_on_laws_of_its_own_static_runs(tiny, client, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    flags = ["--arms", "static,ppo,openloop,static_final:ppo", "--sizes", "1,2,3", "--tuning-seeds", "1"]
    ppo = [
        flag for key in ("iterations=2", "decisions=64", "minibatch=32", "hidden=8") for flag in ("--set", f"ppo.{key}")
    ]
    assert sweep.main([*flags, "--train-on", "laws", *ppo, *tiny, "--out", str(out)]) == 0
    found = states(out)
    assert found["controller"]["trained_on"] == "laws"
    tuned = [s for name, s in read_summaries(out) if name.startswith("static") and name.endswith("2000000")]
    assert found["controller"]["parameter_seconds"] == pytest.approx(sum(s["parameter_seconds"] for s in tuned))
    laws = json.loads((out / "ppo" / "spec.json").read_text())["laws"]
    assert laws["floor"] != [0.3, 0.3]
    assert {trial["label"] for trial in found["trials"].values()} >= {"ppo", "openloop", "static_final:ppo"}
    assert sweep.main(["--resume", str(out)]) == 0

    # A store that has had nothing yet gets it all, the controller's training and its policy too.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    assert sweep.main(["--resume", str(out)]) == 0
    other = MlflowClient(f"sqlite:///{tmp_path}/other.db")
    check_tracked(lambda: other, out)
    [run] = other.search_runs([other.get_experiment_by_name("esper-controllers").experiment_id])
    assert [point.step for point in other.get_metric_history(run.info.run_id, "return_mean")] == [1, 2]
    assert other.get_run(run.data.tags["mlflow.parentRunId"]).data.tags["kind"] == "sweep"


def read_summaries(out: Path) -> list[tuple[str, dict]]:
    return [(path.parent.name, json.loads(path.read_text())) for path in out.glob("trials/*/summary.json")]


def trial_processes(driver: int) -> list[int]:
    """Ray's processes in which a trial runs."""
    import psutil

    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::ImplicitFunc.train"] or "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", ","], "names no arm"),
        (["--arms", "static,tamio"], "Did you mean 'tamiyo'"),
        (["--arms", "schedule"], "needs a schedule"),
        (["--arms", "ppo", "--policy", "/nowhere"], "policy /nowhere"),
        (["--arms", "static,openloop"], "give --policy CHECKPOINT"),
        (["--arms", "static,static_final"], "names none: add one"),
        (["--seeds", "0"], "--seeds 0"),
        (["--tune-lr", "--tuning-seeds", "0"], "--tuning-seeds is 0: give at least 1"),
        (["--arms", "static,ppo", "--train-on", "laws"], "give more, such as --sizes 1,2,4"),
        (["--grid", "budget.amont=1,2"], "budget.amont"),
        (["--grid", "fleet.cpus=1,2"], "changes no number of a run"),
        (["--sizes", "one"], "--sizes 'one'"),
        (["--arms", "static", "--policy", "/nowhere"], "--policy is for arm 'ppo'"),
        (["--resume", "/nowhere"], "--resume takes everything from /nowhere"),
    ],
)
def test_bad_input(tiny, tmp_path, capfd, arguments, sentence):
    assert sweep.main([*tiny, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resuming_what_is_no_sweep_or_another_one(tiny, tmp_path, capfd):
    assert sweep.main(["--resume", str(tmp_path / "none")]) == 2
    assert "--resume" in capfd.readouterr().err
    out = tmp_path / "sweep"
    assert sweep.main(["--arms", "static", *tiny, "--out", str(out)]) == 0
    spec = json.loads((out / "spec.json").read_text())
    spec["data"]["batch_size"] += 1
    (out / "spec.json").write_text(json.dumps(spec))
    assert sweep.main(["--resume", str(out)]) == 2
    assert "holds a run of another spec" in capfd.readouterr().err


def test_an_experiment_that_was_deleted(tiny, client, tmp_path, capfd):
    with Tracker.start("esper-tinystories", "first"):
        pass
    store = client()
    store.delete_experiment(store.get_experiment_by_name("esper-tinystories").experiment_id)
    out = tmp_path / "sweep"
    assert sweep.main(["--arms", "static", *tiny, "--out", str(out)]) == 0  # the results are kept all the same
    assert "mlflow experiments restore" in capfd.readouterr().err
    assert (out / "summary.json").is_file()
