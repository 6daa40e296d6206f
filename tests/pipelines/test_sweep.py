"""`esper sweep` end to end on a real Ray cluster with Tune, and what MLflow shows of it."""

import json

import pytest

from esper.pipelines import sweep

ARMS = ["--arms", "baseline,random", "--seeds", "2"]


def test_a_sweep_leaves_summaries_picture_table_and_child_runs(tiny, client, tmp_path, capfd):
    out = tmp_path / "sweep"
    assert sweep.main([*ARMS, *tiny, "--out", str(out)]) == 0
    summaries = json.loads((out / "summary.json").read_text())
    assert [(s["arm"], s["seed"]) for s in summaries] == [("static", 0), ("static", 1), ("random", 0), ("random", 1)]
    assert summaries[2]["grafts"]
    # Arms are paired: equal seeds see the same batches and start from the same weights.
    assert summaries[0]["val_curve"][0]["val_loss"] == summaries[2]["val_curve"][0]["val_loss"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().err
    assert "val loss" in printed
    assert "random" in printed
    assert "WARNING" not in printed

    store = client()
    children = [store.get_run(s["mlflow"]) for s in summaries]
    parents = {run.data.tags["mlflow.parentRunId"] for run in children}
    assert len(parents) == 1
    assert store.get_run(parents.pop()).data.tags["kind"] == "sweep"
    for run, summary in zip(children, summaries, strict=True):
        assert (run.data.tags["arm"], run.data.tags["seed"]) == (summary["arm"], str(summary["seed"]))
        assert run.info.status == "FINISHED"
        assert len(store.get_metric_history(run.info.run_id, "val_loss")) == summary["decisions"]
        assert run.data.metrics["parameter_seconds"] == pytest.approx(summary["parameter_seconds"])


def test_a_trial_that_fails_is_named_and_the_others_go_on(tiny, tmp_path, capfd):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"at": 0.5, "blueprint": "ffn", "site": "h7.ffn"}]))
    out = tmp_path / "sweep"
    assert sweep.main(["--arms", "static,schedule", "--schedule", str(plan), *tiny, "--out", str(out)]) == 1
    assert [s["arm"] for s in json.loads((out / "summary.json").read_text())] == ["static"]
    assert "failed  schedule-seed0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", ","], "names no arm"),
        (["--arms", "static,tamio"], "Did you mean 'tamiyo'"),
        (["--arms", "schedule"], "needs a schedule"),
        (["--arms", "ppo", "--policy", "/nowhere"], "policy /nowhere"),
        (["--seeds", "0"], "--seeds 0"),
    ],
)
def test_bad_input(tiny, tmp_path, capfd, arguments, sentence):
    assert sweep.main([*tiny, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
