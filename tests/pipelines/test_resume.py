"""`esper train --resume` end to end: a run that was stopped or killed ends as the one that never was.

Real processes and signals. Alone: `pytest tests/pipelines/test_resume.py`.
"""

import json
import signal
import subprocess
import sys
import time

import pytest

from esper.pipelines.train import main
from esper.platform.checkpoint import read

TRAIN = [sys.executable, "-m", "esper.pipelines.train"]
LONG = ["--set", "budget.amount=900", "--set", "budget.decisions=30"]


def summary_of(folder):
    """Without wall times and MLflow's id."""
    summary = json.loads((folder / "summary.json").read_text())
    for point in summary["val_curve"]:
        del point["wall_seconds"]
    return {k: v for k, v in summary.items() if k not in ("wall_seconds", "validation_seconds", "mlflow")}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    entries = [
        {"at": 0.05, "blueprint": "ffn"},
        {"at": 0.1, "blueprint": "block"},
        {"at": 0.5, "blueprint": "attention"},
    ]
    path.write_text(json.dumps(entries))
    return path


def saved_step(out):
    """Optimizer steps in the run's checkpoint; 0 before there is one."""
    path = out / "checkpoints" / "run.safetensors"
    return read(path)[0]["books"]["ledger"]["steps"] if path.exists() else 0


def begun(command, out):
    """The process, once it has written a checkpoint past the first and trained on for a while."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not saved_step(out):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.1)
    return process


@pytest.mark.parametrize(
    "number",
    # Ctrl-C takes the same way as SIGTERM.
    [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGKILL],
    ids=lambda number: number.name,
)
def test_stopped_or_killed_it_ends_the_same(tiny, plan, client, tmp_path, capfd, number):
    flags = ["schedule", "--schedule", str(plan), *tiny, *LONG]
    out = tmp_path / "stopped"
    process = begun([*TRAIN, *flags, "--out", str(out)], out)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert not (out / "summary.json").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        step = int(printed.split("saved at optimizer step ")[1].split(";")[0].replace(",", ""))
        assert printed.strip().endswith(f"go on with: esper train --resume {out}")
        assert saved_step(out) == step

    assert main(["--resume", str(out)]) == 0
    resumed = capfd.readouterr().err
    if number != signal.SIGKILL:
        assert f"resume  {out}, schedule, at optimizer step {step:,}" in resumed
    assert main([*flags, "--out", str(tmp_path / "undisturbed")]) == 0
    assert summary_of(out) == summary_of(tmp_path / "undisturbed")
    run_id = json.loads((out / "summary.json").read_text())["mlflow"]
    run = client().get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "stopped")
    steps = {metric.step for metric in client().get_metric_history(run_id, "val_loss")}
    if number != signal.SIGKILL:
        assert steps == {point["steps"] for point in summary_of(out)["val_curve"][1:]}
        assert len(client().search_runs([run.info.experiment_id])) == 2


def test_what_cannot_be_resumed_is_refused(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(["static", *tiny, "--out", str(out)]) == 0
    capfd.readouterr()
    assert main(["--resume", str(out)]) == 2
    assert "has ended" in capfd.readouterr().err
    (out / "summary.json").unlink()
    assert main(["--resume", str(out), "--seed", "3"]) == 2
    assert "leave out --seed" in capfd.readouterr().err
    tensors = out / "checkpoints" / "run.safetensors"
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    assert main(["--resume", str(out)]) == 2
    printed = capfd.readouterr().err
    assert "checksum" in printed
    assert "Traceback" not in printed
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    assert main(["--resume", str(out)]) == 0  # killed between its last checkpoint and its summary
    assert main(["--resume", str(tmp_path)]) == 2
