"""`esper train` end to end: what it leaves, what MLflow gets, what it refuses."""

import json

import pytest

from esper.pipelines.train import main
from esper.platform.spec import saved_spec
from tests.mlflow_servers import free_port

SUMMARY = (
    "arm seed preset val_loss perplexity parameters parameters_non_embedding tokens flops seconds wall_seconds "
    "parameter_seconds clock decisions grafts val_curve"
)
GRAFT = "budget_fraction site blueprint parameters_before parameters_after val_loss_before val_loss_after"
POINT = "budget_fraction tokens flops seconds wall_seconds parameter_seconds parameters val_loss"


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_leaves_its_summary_spec_and_mlflow_run(tiny, client, tmp_path, capfd):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"at": 0.2, "blueprint": "ffn"}, {"at": 0.5, "blueprint": "block"}]))
    out = tmp_path / "out"
    assert main(["schedule", "--schedule", str(plan), *tiny, "--out", str(out), "--seed", "3"]) == 0
    summary = summary_of(out)
    assert set(SUMMARY.split()) <= set(summary)
    assert (summary["arm"], summary["seed"], summary["decisions"]) == ("schedule", 3, 8)
    assert [graft["blueprint"] for graft in summary["grafts"]] == ["ffn", "block"]
    assert set(GRAFT.split()) <= set(summary["grafts"][0])
    assert len(summary["val_curve"]) == 9
    assert set(POINT.split()) <= set(summary["val_curve"][0])
    assert summary["val_curve"][0]["budget_fraction"] == 0
    assert saved_spec(out / "spec.json").budget.decisions == 8
    printed = capfd.readouterr().err
    assert "100% of budget, step 40" in printed
    assert str(out / "summary.json") in printed
    assert "mlflow ui" in printed

    run = client().get_run(summary["mlflow"])
    assert {run.data.tags[key] for key in ("arm", "seed", "preset")} == {"schedule", "3", "tiny"}
    assert run.data.metrics["val_loss"] == pytest.approx(summary["val_loss"])
    assert run.info.status == "FINISHED"
    histories = {key: client().get_metric_history(summary["mlflow"], key) for key in (*POINT.split(), "perplexity")}
    steps = [[metric.step for metric in history] for history in histories.values()]
    assert steps[0] == [5 * k for k in range(1, 9)]
    assert all(other == steps[0] for other in steps)


def test_same_seed_same_summary(tiny, tmp_path):
    for name in ("a", "b"):
        assert main(["random", *tiny, "--out", str(tmp_path / name)]) == 0
    a, b = (summary_of(tmp_path / name) for name in "ab")
    for summary in (a, b):
        for measured in ("wall_seconds", "validation_seconds", "mlflow"):
            del summary[measured]
        for point in summary["val_curve"]:
            del point["wall_seconds"]
    assert a == b


def test_random_matches_another_run(tiny, tmp_path):
    assert main(["random", *tiny, "--out", str(tmp_path / "a"), "--seed", "5"]) == 0
    match = ["--match", str(tmp_path / "a" / "summary.json")]
    assert main(["random", *tiny, "--out", str(tmp_path / "b"), "--seed", "6", *match]) == 0
    a, b = (sorted(graft["blueprint"] for graft in summary_of(tmp_path / name)["grafts"]) for name in "ab")
    assert a == b != []


def test_planned_grafts_that_were_not_played_are_told(tiny, tmp_path, capfd):
    assert main(["onejump", *tiny, "--out", str(tmp_path / "a")]) == 0
    assert "not played" not in capfd.readouterr().err
    assert main(["onejump", *tiny, "--out", str(tmp_path / "b"), "--set", "growth.max_layers=1"]) == 0
    assert "planned and not played: block at 15%" in capfd.readouterr().err
    assert summary_of(tmp_path / "b")["unplayed"] == ["block at 15%"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["statik"], "unknown arm 'statik'"),
        (["ppo"], "needs a trained policy"),
        (["schedule"], "needs a schedule"),
        (["static", "--set", "budget.amount=0"], "budget.amount is 0"),
        (["static", "--set", 'growth.blueprints={"fnn": {}}'], "Did you mean 'ffn'"),
        (["static", "--set", "data.tokenizer=bpe:300"], "ask for 'char'"),
        (["static", "--set", "host.block_size=1000000"], "too few for a context"),
        (["static", "--task", "poems"], "unknown task"),
        (["static", "--policy"], "expected one argument"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tiny, tmp_path, capfd, arguments, sentence):
    out = tmp_path / "out"
    assert main([*arguments[:1], *tiny, "--out", str(out), *arguments[1:]]) == 2
    printed = capfd.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("error:")]) == 1
    assert not (out / "summary.json").exists()


def test_another_runs_folder_is_refused(tiny, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    assert main(["static", *tiny, "--out", str(tmp_path / "out")]) == 2
    assert "already holds another run" in capfd.readouterr().err
    assert (tmp_path / "out" / "summary.json").read_text() == "{}"


def test_a_dead_mlflow_server_does_not_stop_a_run(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")  # one that nobody told of yet
    assert main(["static", *tiny, "--out", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err.count("MLflow at") == 1
    assert summary_of(tmp_path / "out")["mlflow"] is None
