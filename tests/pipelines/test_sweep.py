"""`esper sweep` end to end, with Ray Tune and a real MLflow store: stages, deaths, resuming, bad input."""

import itertools
import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from mlflow import MlflowClient

from esper.pipelines import sweep
from esper.pipelines.common.statistics import Interval
from esper.pipelines.common.stopping import Stopped
from esper.pipelines.sweeps import comparison, plan, search
from esper.pipelines.sweeps.search import Setting
from esper.platform import tracking
from esper.platform.recording import SEEN_FILE
from tests.mlflow_servers import free_port
from tests.pipelines.helpers import planned, read, sets, start, summary_of, wait_for

pytestmark = pytest.mark.usefixtures("one_ray")
SCHEDULES = ("onejump", "schedule")
ARMS = ("static", *SCHEDULES, "random:onejump", "static_final:onejump", "static_lrpath:onejump")
POINTS = ("val_loss", "parameter_seconds", "learning_rate")


@pytest.fixture
def tiny(tiny):
    """One trial at a time: a stage's processes take seconds to start, and a trial here none."""
    return [*tiny, *sets("fleet.cpus=2")]


def state(out: Path) -> dict:
    return read(out, "sweep.json")


def summary(out: Path, trial: str) -> dict:
    return summary_of(out / "trials" / trial)


def children(store: MlflowClient, out: Path) -> dict:
    """The sweep's trials in MLflow, by name."""
    experiment = store.get_experiment_by_name("esper-stories").experiment_id
    [parent] = store.search_runs([experiment], f"tags.`esper.key` = '{read(out, 'inputs/plan.json')['key']}'")
    runs = store.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


def check_tracked(store: MlflowClient, out: Path) -> dict:
    """Exactly the planned runs, all finished, every point once; by name."""
    runs = children(store, out)
    assert sorted(runs) == sorted(state(out)["trials"])
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        curve = summary(out, name)["val_curve"]
        assert len(pq.read_table(out / "trials" / name / SEEN_FILE)) == len(curve)
        for key in POINTS:
            points = [(point.step, point.value) for point in store.get_metric_history(run.info.run_id, key)]
            assert sorted(points) == [(int(p["steps"]), pytest.approx(p[key])) for p in curve]
        grid = store.get_metric_history(run.info.run_id, "grid/val_loss")
        assert sorted(point.step for point in grid) == list(range(9))
    return runs


def test_every_stage(tiny, client, tmp_path, capfd, monkeypatch):
    # For each size and for each schedule; the search has tests of its own.
    tries = itertools.cycle([Setting(0.003, 0.6), Setting(0.005, 0.8), Setting(1.0, 0.6), Setting(2.0, 0.6)])
    monkeypatch.setattr(search, "next_settings", lambda start, decays, tried: [] if tried else [next(tries)])
    out, late = tmp_path / "sweep", planned(tmp_path, {0.99: "ffn"})  # never comes: none does while the rate decays
    flags = ["--arms", ",".join(ARMS), "--sizes", "2x24,1", "--tuning-seeds", "1", "--tune-lr", *late]
    assert sweep.main([*flags, *tiny, "--out", str(out)]) == 0
    printed = capfd.readouterr().err
    told = ["rates   2 trials: static-1, static-2x24", "rates   2 trials: onejump, schedule", "tuning ", "test   "]
    for part in (*told, "follow ", "done", "left", "viewStateShareKey"):
        assert part in printed
    assert "WARNING" not in printed
    found = state(out)
    point = found["points"][0]
    assert {trial["status"] for trial in found["trials"].values()} == {"done"}
    assert point["size"] in ("1", "2x24")
    assert point["schedule"] in SCHEDULES
    settings = {"static-1": [0.003, 0.6], "static-2x24": [0.005, 0.8], "onejump": [1.0, 0.6], "schedule": [2.0, 0.6]}
    assert point["settings"] == settings
    tests = {trial["label"] for trial in found["trials"].values() if trial["purpose"] == "test"}
    assert tests == {"static-1", "static-2x24", *ARMS[1:]}
    # What was spent beside the test runs: 40 steps a trial, and two forks in those that are annealed.
    assert point["spent"]["rates"]["steps"] == 4 * 40
    assert point["spent"]["tuning"]["steps"] == 3 * (40 + 7 + 10) + (40 + 3 + 5)
    ended = {arm: summary(out, f"{arm.replace(':', '.of.')}-seed0") for arm in tests}
    # Arms are paired: equal seeds see the same batches and start from the same weights.
    assert len({ended[arm]["val_curve"][0]["val_loss"] for arm in ("static-1", *SCHEDULES)}) == 1
    assert ended["static_final:onejump"]["shape"] == ended["onejump"]["shape"]
    assert ended["static_lrpath:onejump"]["layers"] == int(point["size"][0])
    assert [layer["width"] for layer in ended["static-2x24"]["shape"]] == [24, 24]
    grafted = sorted(graft["blueprint"] for graft in ended["onejump"]["grafts"])
    assert sorted(graft["blueprint"] for graft in ended["random:onejump"]["grafts"]) == grafted != []
    assert len(ended["static-1"]["annealed"]) == 2
    # An arm that did not graft is that static size, at its factor on that size's rate, and is told as such.
    assert ended["schedule"]["grafts"] == []
    rates = [[p["learning_rate"] for p in ended[arm]["val_curve"]] for arm in ("static-1", "onejump", "schedule")]
    assert rates[1][:3] == rates[0][:3]  # it grows later
    assert rates[2] == pytest.approx([2 * rate for rate in rates[0]])
    assert "it did not grow" in printed
    store = client()
    runs = check_tracked(store, out)
    run = runs["static_final.of.onejump-seed0"]
    tags = {"arm": "static_final", "label": "static_final:onejump", "size": str(ended["onejump"]["layers"])}
    assert run.data.tags.items() >= {**tags, "seed": "0", "purpose": "test", "grid": "{}", "preset": "tiny"}.items()
    assert len({key for run in runs.values() for key in run.data.metrics}) <= 25
    assert run.inputs.dataset_inputs[0].dataset.name == "stories"
    assert {entry.path for entry in store.list_artifacts(run.info.run_id)} == {"summary.json", "spec.json"}
    kept = {entry.path for entry in store.list_artifacts(run.data.tags["mlflow.parentRunId"])}
    assert kept >= {"spec.json", "sweep.json", "summary.json", "report"}
    assert (out / "report" / "report.html").is_file()

    # A resume runs and doubles nothing. What was chosen stays chosen: a trial that failed then is not tried again,
    # under runs that rest on the choice.
    (out / "trials" / "onejump-seed2000000" / "summary.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/summary.json")}
    assert sweep.main(["--resume", str(out)]) == 1
    assert {path: path.stat().st_mtime_ns for path in out.glob("trials/*/summary.json")} == before
    settled = state(out)["points"][0]
    assert (settled["settings"], settled["size"]) == (point["settings"], point["size"])
    assert "failed  onejump-seed2000000: it has not been run to its end" in capfd.readouterr().err
    assert len(children(store, out)) == len(runs)


def test_two_budgets_with_sizes_and_seeds_as_many_as_it_takes(tiny, client, tmp_path, capfd, monkeypatch):
    """The search goes up in layers; the interval is never so narrow. Stopped and resumed, it goes on with seed 2."""
    for module in (comparison, plan):
        monkeypatch.setattr(module, "AT_ONCE", 2)
    out, stages_run, run_trials = tmp_path / "sweep", [], comparison.run_trials

    def stopping(stage, trials, *others):
        stages_run.append(stage)
        if stages_run.count("test") == 2:
            raise Stopped(signal.SIGINT)
        run_trials(stage, trials, *others)

    flags = ["--arms", "static,onejump", "--tuning-seeds", "1", "--width", "1e-9", "--budgets", "24,16"]
    flags += ["--sizes", "auto", "--seeds", "auto:3", *sets("budget.cooldowns=[]")]
    with monkeypatch.context() as patched:
        patched.setattr(comparison, "run_trials", stopping)
        small = sets('growth.blueprints={"block":{}}', "growth.max_layers=2", "growth.min_optimizer_steps=3")
        assert sweep.main([*flags, *small, *tiny, "--out", str(out)]) == 128 + signal.SIGINT
    assert "seeds   2 of at most 3: the interval of onejump's regret is" in capfd.readouterr().err
    assert state(out)["seeds"] == list(range(3))  # begun
    assert sweep.main(["--resume", str(out)]) == 0
    told = capfd.readouterr().err
    assert re.search(r"arm +16 +24 +mean +would show", told)
    assert re.search(r"\nbudget.amount = (16|24): \S+ writes: ", told)
    assert "budget.amount = 16: a decision holds 2 steps after a graft" in told
    assert told.count("ever be grafted") == 1
    found = state(out)
    points, trials, sizes = found["points"], found["trials"], ["1", "2"]
    assert found["seeds"] == list(range(3))
    assert [point["budget"]["amount"] for point in points] == [16, 24]
    for point in points:
        assert point["sizes"] == [["1"], ["2"], []]
        own = [trial for trial in trials.values() if trial["grid"] == point["grid"]]
        assert {trial["label"] for trial in own if trial["purpose"] == "tuning"} == {"static-1", "static-2"}
        tests = Counter(trial["label"] for trial in own if trial["purpose"] == "test")
        assert tests == dict.fromkeys(["onejump", "static-1", "static-2"], 3)
    assert not any(summary(out, name)["annealed"] for name in trials)  # as asked
    runs = check_tracked(client(), out)
    assert all(run.data.metrics["steps"] == json.loads(run.data.tags["grid"])["budget.amount"] for run in runs.values())

    def ends(label, point):
        names = {(t["label"], t["grid"], t["seed"]): name for name, t in trials.items()}
        return [summary(out, names[label, point["grid"], seed])["val_loss"] for seed in range(3)]

    regrets = [np.subtract(ends("onejump", p), ends(f"static-{p['size']}", p)) for p in points]
    intervals = [Interval.of(values, sequential=True).as_dict() for values in (*regrets, np.mean(regrets, axis=0))]
    report = read(out, "report/report.json")
    rows = {row["budget"]: row["regret"] for row in report["budgets"][0]["rows"] if row["arm"] == "onejump"}
    assert [rows[budget] for budget in (16, 24, None)] == [pytest.approx(interval) for interval in intervals]
    judged = [test for verdict in report["verdicts"] for test in verdict["tests"]]
    told = [test["interval"] for test in judged if (test["baseline"], test["axis"]) == ("best static", "tokens")]
    assert told == [pytest.approx(intervals[1])]  # at 16 nothing could grow
    page = (out / "report" / "report.html").read_text()
    for words in ("those of a confidence sequence", "added until 95 % intervals", f"tested: {', '.join(sizes)}"):
        assert words in page
    parent = next(iter(runs.values())).data.tags["mlflow.parentRunId"]
    tracked = {point.step: point.value for point in client().get_metric_history(parent, "regret/onejump")}
    assert tracked == {budget: pytest.approx(rows[budget]["mean"]) for budget in (16, 24)}
    assert client().get_run(parent).data.metrics["mean_regret/onejump"] == pytest.approx(rows[None]["mean"])


def test_a_failed_trial_stops_no_other_and_an_absent_store_nothing(tiny, tmp_path, refused, monkeypatch, capfd):
    """Stopped before its first trial, it also goes on with the schedule that it began with, or not at all."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(comparison, "SYNC_SECONDS", 3)
    monkeypatch.setattr(tracking, "AWAY_SECONDS", 1)
    plan, out = tmp_path / "plan.json", tmp_path / "sweep"
    plan.write_text(json.dumps([{"at": 0.5, "blueprint": "ffn", "site": "h7.ffn"}]))

    def stopped(*arguments):
        raise Stopped(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(comparison, "run_trials", stopped)
        flags = ["--arms", "static,schedule,static_final:schedule", "--schedule", str(plan)]
        assert sweep.main([*flags, *tiny, "--out", str(out)]) == 128 + signal.SIGINT
    copy = out / "inputs" / "schedule.json"
    before = copy.read_text()
    copy.write_text(before + " ")
    refused(sweep.main, ["--resume", out], f"{copy} was changed")
    assert not list(out.glob("trials/*/summary.json"))
    copy.write_text(before)
    plan.write_text("[]")  # the sweep has a copy
    assert sweep.main(["--resume", str(out)]) == 1
    assert [s["arm"] for s in read(out, "summary.json")] == ["static-1"]
    printed = capfd.readouterr().err
    assert "failed  schedule-seed0: unknown site for ffn in the schedule 'h7.ffn'" in printed
    assert "failed  static_final.of.schedule-seed0: schedule has no sound run of this seed to follow" in printed
    assert f"MLflow was not to be had: send it all, and get the report, with: esper sweep --resume {out}" in printed
    assert "this takes 3 s at most" in printed
    assert state(out)["trials"]["static_final.of.schedule-seed0"]["status"] == "failed"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert sweep.main(["--resume", str(out)]) == 1
    statuses = {name: run.info.status for name, run in children(MlflowClient(), out).items()}
    assert statuses == {"static-1-seed0": "FINISHED", "schedule-seed0": "FAILED"}


def trial_processes(owner: int) -> list[int]:
    """Processes in which a trial runs, of the Ray cluster that a process has started. Asked often, it takes a core."""
    children = [child.pid for child in psutil.Process(owner).children(recursive=True)]
    return [p.pid for p in psutil.process_iter(["cmdline"]) if p.pid in children and "ImplicitFunc" in str(p.info)]


@pytest.fixture
def attached(monkeypatch):
    """Drivers use this process's cluster, in which no trial runs any more."""
    wait_for(lambda: not trial_processes(os.getpid()))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


@pytest.mark.usefixtures("attached")
def test_deaths_of_a_trial_and_of_the_driver(tiny, client, tmp_path):
    """The cluster outlives its driver, as it does for `ray job submit`."""
    out = tmp_path / "sweep"
    slow = sets("fleet.cpus=1", "budget.amount=1200")  # seconds a trial
    flags = ["--arms", "static,onejump", *tiny, *slow, "--out", str(out)]
    process = start("sweep", flags, tmp_path / "stderr")
    try:
        wait_for(lambda: list(out.glob("saves/*")) and trial_processes(os.getpid()))
        os.kill(trial_processes(os.getpid())[0], signal.SIGKILL)
        wait_for(lambda: list(out.glob("trials/*/summary.json")))
        assert "its process died; it is started again" in (tmp_path / "stderr").read_text()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(out.glob("trials/*/summary.json"))) == 1
    assert sweep.main(["--resume", str(out)]) == 0
    assert {trial["status"] for trial in state(out)["trials"].values()} == {"done"}
    check_tracked(client(), out)


@pytest.mark.usefixtures("attached")
def test_ctrl_c_ends_lag_trials_and_forks_at_once(tiny, tmp_path, client):
    out = tmp_path / "sweep"
    slow = sets("fleet.cpus=1", "budget.amount=4000", "budget.cooldowns=[0.3]", "host.n_embd=64")
    process = start("sweep", ["--arms", "static,lag", *tiny, *slow, "--out", str(out)], tmp_path / "stderr")
    try:
        wait_for(lambda: list(out.glob("saves/*")) and len(trial_processes(os.getpid())) == 2, process)
        trials = trial_processes(os.getpid())
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
    assert time.monotonic() - begun < 15  # two seconds for trials and MLflow, and cores may be shared
    wait_for(lambda: not any(map(psutil.pid_exists, trials)), 5)
    said = (tmp_path / "stderr").read_text()
    assert re.search(r"a run that stays at its starting size sees each token 5\.\d times \(epochs\)", said)
    assert f"go on with: esper sweep --resume {out}" in said
    assert {run.info.status for run in children(client(), out).values()} == {"KILLED"}


@pytest.mark.slow
def test_a_controller_trained_on_laws_of_its_own_static_runs(tiny, client, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    flags = ["--arms", "static,ppo,openloop,static_final:ppo", "--sizes", "1,2,3", "--tuning-seeds", "1"]
    small = sets("ppo.iterations=2", "ppo.decisions=64", "ppo.minibatch=32", "ppo.hidden=8", "ppo.held_out=2")
    monkeypatch.setattr(search, "next_settings", lambda start, *others: [] if others[-1] else [Setting(start, 0.6)])
    assert sweep.main([*flags, "--train-on", "laws", "--tune-lr", *small, *tiny, "--out", str(out)]) == 0
    found = state(out)
    assert found["points"][0]["settings"]["ppo"] == [1.0, 0.6]
    assert found["controller"]["trained_on"] == "laws"
    assert found["points"][0]["spent"]["controller"]["steps"] == 0
    assert read(out / "ppo", "spec.json")["laws"]["floor"] != [0.3, 0.3]
    assert {trial["label"] for trial in found["trials"].values()} >= {"ppo", "openloop", "static_final:ppo"}

    # A store that has had nothing yet gets it all, the controller's training too.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    assert sweep.main(["--resume", str(out)]) == 0
    other = MlflowClient(f"sqlite:///{tmp_path}/other.db")
    check_tracked(other, out)
    [run] = other.search_runs([other.get_experiment_by_name("esper-controllers").experiment_id])
    assert [point.step for point in other.get_metric_history(run.info.run_id, "return_mean")] == [1, 2]
    assert other.get_run(run.data.tags["mlflow.parentRunId"]).data.tags["kind"] == "sweep"
