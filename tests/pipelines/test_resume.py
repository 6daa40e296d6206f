"""`esper train --resume` end to end: a run that was stopped or killed ends as the one that never was.

Real processes and signals.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest

from esper.pipelines.common import single_run
from esper.pipelines.train import main
from esper.platform.recording import SEEN_FILE
from esper.platform.storage import alone
from tests.mlflow_servers import free_port
from tests.pipelines import helpers
from tests.pipelines.helpers import planned, sets, start, wait_for

LONG = sets("budget.amount=450", "budget.decisions=15")


def summary_of(folder):
    """Without wall times and MLflow's id."""
    summary = helpers.summary_of(folder)
    for point in summary["val_curve"]:
        del point["wall_seconds"]
    return {k: v for k, v in summary.items() if k not in ("wall_seconds", "validation_seconds", "mlflow")}


@pytest.fixture
def plan(tmp_path):
    return planned(tmp_path, {0.05: "ffn", 0.1: "block", 0.5: "attention"})


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


STOPS = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}


def test_stopped_or_killed_it_ends_the_same(tiny, plan, runs, tmp_path, capfd, monkeypatch):
    flags, shown = ["schedule", *plan, *tiny, *LONG], {}
    folders = {name: tmp_path / name for name in (*STOPS, "killed at once")}
    processes = {key: start("train", [*flags, "--out", str(folders[key])], tmp_path / f"{key}.log") for key in STOPS}
    with monkeypatch.context() as patch:  # killed before it had anything to train
        patch.setattr(single_run, "train", lambda *arguments: 0)
        assert main([*flags, "--out", str(folders["killed at once"])]) == 0
    for name, process in processes.items():
        wait_for((folders[name] / "checkpoints" / "run.safetensors").exists, process)
        process.send_signal(STOPS[name])
    for name, process in processes.items():
        assert process.wait(60) == (-STOPS[name] if name == "killed" else 128 + STOPS[name])
        shown[name] = (tmp_path / f"{name}.log").read_text()
    assert not [out for out in folders.values() if (out / "summary.json").exists()]
    assert f"go on with: esper train --resume {folders['stopped']}" in shown["stopped"]
    step = shown["stopped"].split("saved at optimizer step ")[1].split()[0]
    Path(plan[1]).unlink()  # the runs have their own
    again = ["schedule", "--schedule", str(folders["killed"] / "inputs" / "schedule.json"), *flags[3:]]
    assert main([*again, "--out", str(tmp_path / "undisturbed")]) == 0
    for name, out in folders.items():
        assert main(["--resume", str(out)]) == 0
        resumed = capfd.readouterr().err
        assert f"resume  {out}, schedule, at optimizer step {step if name == 'stopped' else ''}" in resumed
        assert summary_of(out) == summary_of(tmp_path / "undisturbed")
        assert (out / SEEN_FILE).read_bytes() == (tmp_path / "undisturbed" / SEEN_FILE).read_bytes()
    assert runs() == {name: finished(tmp_path / name) for name in (*folders, "undisturbed")}


def test_what_mlflow_has_not_had_is_sent_at_resume(tiny, tmp_path, runs, monkeypatch, capfd, refused):
    store, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    with monkeypatch.context() as away:
        away.setattr("esper.platform.tracking.CLOSE_SECONDS", 1.5)
        away.setattr("esper.platform.tracking.AWAY_SECONDS", 1.5)
        away.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        assert main(["static", *tiny, "--out", str(out)]) == 0
        assert capfd.readouterr().err.count("MLflow at") == 2  # takes nothing, and has not had everything
        refused(main, ["--resume", out], "MLflow did not take everything")
    assert main(["--resume", str(out)]) == 0
    assert runs() == {"run": finished(out)}
    refused(main, ["--resume", out], "has ended")
    journal = out / "tracking.jsonl"
    *before, end = journal.read_text().splitlines()  # as if killed after its summary
    assert json.loads(end)["kind"] == "end"
    journal.write_text("\n".join([*before, ""]))
    sent = out / "tracking.sent.json"
    sent.write_text(json.dumps({store: len(before)}))
    assert main(["--resume", str(out)]) == 0
    assert runs() == {"run": finished(out)}
    lines = journal.read_text().splitlines()
    assert (json.loads(lines[-1])["kind"], json.loads(sent.read_text())) == ("end", {store: len(lines)})


def test_a_resume_rests_on_what_the_run_began_with(tiny, plan, tokens, tmp_path, refused):
    out, flags = tmp_path / "run", ["schedule", *plan, *tiny]
    assert main([*flags, "--out", str(out)]) == 0
    ended = summary_of(out)
    (out / "summary.json").unlink()  # as if killed before it was written
    refused(main, ["--resume", tmp_path])
    with alone(out):
        refused(main, ["--resume", out], "another process works in")
    for name, old, new, sentence in (
        ("spec.json", '"batch_size": 4', '"batch_size": 5', "spec.json was changed since the run began"),
        ("pins.json", tokens.manifest.fingerprint(), "f00d", "began with other text (f00d) than there is now"),
    ):
        whole = (out / name).read_text()
        (out / name).write_text(whole.replace(old, new))
        refused(main, ["--resume", out], sentence)
        (out / name).write_text(whole)
    begun = tmp_path / "begun"  # as if killed while it began
    shutil.copytree(out / "inputs", begun / "inputs")
    assert main([*flags, "--out", str(begun)]) == 0
    assert main(["--resume", str(out)]) == 0
    assert summary_of(out) == ended
