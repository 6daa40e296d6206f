"""`esper train --resume` end to end: a run that was stopped or killed ends as the one that never was.

Real processes and signals. Alone: `pytest tests/pipelines/test_resume.py`.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from esper.pipelines.train import main
from esper.platform.spec import DataSpec
from esper.platform.storage import alone
from esper.workers.tolaria.data import prepare
from tests.mlflow_servers import free_port

TRAIN = [sys.executable, "-m", "esper.pipelines.train"]
LONG = ["--set", "budget.amount=450", "--set", "budget.decisions=15"]
FIRST_CHECKPOINT, BEGUN = "checkpoints/run.safetensors", "pins.json"


def summary_of(folder):
    """Without wall times and MLflow's id."""
    summary = json.loads((folder / "summary.json").read_text())
    for point in summary["val_curve"]:
        del point["wall_seconds"]
    return {k: v for k, v in summary.items() if k not in ("wall_seconds", "validation_seconds", "mlflow")}


@pytest.fixture
def plan(tmp_path):
    grafts = [(0.05, "ffn"), (0.1, "block"), (0.5, "attention")]
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps([{"at": at, "blueprint": blueprint} for at, blueprint in grafts]))
    return path


@pytest.fixture
def runs(client, tmp_path):
    """Status and steps at which MLflow has a loss, of each run: they are to be there once each."""

    def found():
        store = client()
        runs = store.search_runs([store.get_experiment_by_name("esper-stories").experiment_id])
        histories = {run: store.get_metric_history(run.info.run_id, "val_loss") for run in runs}
        return {run.info.run_name: (run.info.status, [p.step for p in history]) for run, history in histories.items()}

    return found


def finished(folder):
    """What `runs` must say of it."""
    return ("FINISHED", [point["steps"] for point in summary_of(folder)["val_curve"][1:]])


@pytest.mark.parametrize(
    ("number", "once"),
    [
        # Ctrl-C takes the same way as SIGTERM.
        pytest.param(signal.SIGINT, FIRST_CHECKPOINT, marks=pytest.mark.slow),
        (signal.SIGTERM, FIRST_CHECKPOINT),
        (signal.SIGKILL, FIRST_CHECKPOINT),
        (signal.SIGKILL, BEGUN),
    ],
)
def test_stopped_or_killed_it_ends_the_same(tiny, plan, runs, tmp_path, capfd, number, once):
    flags = ["schedule", "--schedule", str(plan), *tiny, *LONG]
    out = tmp_path / "stopped"
    process = subprocess.Popen([*TRAIN, *flags, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    while not (out / once).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert not (out / "summary.json").exists()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert f"go on with: esper train --resume {out}" in printed
        step = printed.split("saved at optimizer step ")[1].split()[0]

    plan.unlink()  # the run has its own
    assert main(["--resume", str(out)]) == 0
    resumed = capfd.readouterr().err
    assert f"resume  {out}, schedule, at optimizer step " + ("" if number == signal.SIGKILL else step) in resumed
    again = ["schedule", "--schedule", str(out / "inputs" / "schedule.json"), *flags[3:]]
    assert main([*again, "--out", str(tmp_path / "undisturbed")]) == 0
    assert summary_of(out) == summary_of(tmp_path / "undisturbed")
    assert runs() == {name: finished(tmp_path / name) for name in ("stopped", "undisturbed")}


def test_what_mlflow_has_not_had_is_sent_at_resume(tiny, tmp_path, runs, monkeypatch, capfd):
    store, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    monkeypatch.setattr("esper.platform.tracking.CLOSE_SECONDS", 1.5)
    monkeypatch.setattr("esper.platform.tracking.AWAY_SECONDS", 1.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert main(["static", *tiny, "--out", str(out)]) == 0
    assert capfd.readouterr().err.count("MLflow at") == 2  # takes nothing, and has not had everything
    assert main(["--resume", str(out)]) == 2
    assert "MLflow did not take everything" in capfd.readouterr().err
    monkeypatch.setattr("esper.platform.tracking.CLOSE_SECONDS", 60)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert main(["--resume", str(out)]) == 0
    assert runs() == {"run": finished(out)}
    assert main(["--resume", str(out)]) == 2
    assert "has ended" in capfd.readouterr().err
    journal = out / "tracking.jsonl"
    *before, end = journal.read_text().splitlines()  # as if killed after its summary
    assert json.loads(end)["kind"] == "end"
    journal.write_text("\n".join([*before, ""]))
    (out / "tracking.sent.json").write_text(json.dumps({store: len(before)}))
    assert main(["--resume", str(out)]) == 0
    assert runs() == {"run": finished(out)}


def test_a_resume_rests_on_what_the_run_began_with(tiny, plan, shards, text_file, tmp_path, capfd):
    out, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(shards, data)
    flags = ["schedule", "--schedule", str(plan), *tiny, "--data", str(data)]
    assert main([*flags, "--out", str(out)]) == 0
    ended = summary_of(out)
    (out / "summary.json").unlink()  # as if killed before it was written

    def refused(*argv):
        assert main(["--resume", str(out), *argv]) == 2
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        return printed

    assert "leave out --seed" in refused("--seed", "3")
    with alone(out):
        assert "another process works in" in refused()
    for name, old, new in (
        ("spec.json", b'"batch_size": 4', b'"batch_size": 5'),
        ("inputs/schedule.json", b"0.05", b"0.06"),
        ("inputs/plan.json", b'"seed": 0', b'"seed": 1'),
        ("inputs/plan.json", b'"command": "train"', b'"command": "sweep"'),
        (FIRST_CHECKPOINT, b"now/", b"new/"),
    ):
        whole = (out / name).read_bytes()
        assert old in whole
        (out / name).write_bytes(whole.replace(old, new, 1))
        assert "error: " in refused()
        (out / name).write_bytes(whole)
    shutil.rmtree(data)
    (tmp_path / "other.txt").write_text(text_file.read_text().replace("cat", "dog"))
    prepare(DataSpec(source=str(tmp_path / "other.txt")), data)
    assert "text" in refused()
    shutil.rmtree(data)
    shutil.copytree(shards, data)
    assert main(["--resume", str(tmp_path)]) == 2
    begun = tmp_path / "begun"  # as if killed while it began
    shutil.copytree(out / "inputs", begun / "inputs")
    assert main([*flags, "--out", str(begun)]) == 0
    assert main(["--resume", str(out)]) == 0
    assert summary_of(out) == ended
