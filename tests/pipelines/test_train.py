"""`esper train` end to end: what it leaves, what MLflow gets, what it refuses."""

import pytest

from esper.pipelines.train import main
from esper.platform.spec import load_spec
from tests.pipelines.helpers import planned, summary_of

SUMMARY = """arm seed preset val_loss perplexity parameters parameters_non_embedding tokens flops seconds
wall_seconds parameter_seconds clock decisions grafts val_curve"""
GRAFT = "budget_fraction site blueprint parameters_before parameters_after val_loss_before val_loss_after outcome"
POINT = "budget_fraction tokens flops seconds wall_seconds parameter_seconds parameters val_loss"


def test_a_run_leaves_its_summary_spec_and_mlflow_run(tiny, client, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("esper.pipelines.common.single_run.REFRESH_SECONDS", 0)
    out, plan = tmp_path / "out", planned(tmp_path, {0.2: "ffn", 0.5: "block"})
    through_a_parent = ["--out", str(tmp_path / "x" / ".." / "out")]
    assert main(["schedule", *plan, *tiny, *through_a_parent, "--seed", "3"]) == 0
    summary = summary_of(out)
    assert set(SUMMARY.split()) <= set(summary)
    assert (summary["arm"], summary["seed"], summary["decisions"]) == ("schedule", 3, 8)
    assert [graft["blueprint"] for graft in summary["grafts"]] == ["ffn", "block"]
    assert set(GRAFT.split()) <= set(summary["grafts"][0])
    assert len(summary["val_curve"]) == 9
    assert set(POINT.split()) <= set(summary["val_curve"][0])
    assert summary["val_curve"][0]["budget_fraction"] == 0
    assert load_spec(out / "spec.json").budget.decisions == 8
    printed = capfd.readouterr().err
    start, end = "2% of budget, step 1,", "100% of budget, step 40"
    for part in ("GPT of 1 layer, 2 heads", start, end, "2 grafts", f"{out}/summary.json", "mlflow ui"):
        assert part in printed
    assert "/../" not in printed

    run = client().get_run(summary["mlflow"])
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert run.data.tags.items() >= {"arm": "schedule", "seed": "3", "preset": "tiny"}.items()
    assert run.data.params["host.n_embd"] == "16"
    assert run.data.metrics["val_loss"] == pytest.approx(summary["val_loss"])
    assert {file.path for file in client().list_artifacts(summary["mlflow"])} == {"spec.json", "summary.json"}
    for key in (*POINT.split(), "perplexity"):
        history = client().get_metric_history(summary["mlflow"], key)
        assert [metric.step for metric in history] == [5 * k for k in range(1, 9)]


def test_planned_grafts_that_were_not_played_are_told(tiny, tmp_path, capfd):
    (tmp_path / "other.json").write_text('{"grafts": [{"blueprint": "ffn"}, {"blueprint": "block"}]}')
    flags = ["--match", str(tmp_path / "other.json"), "--out", str(tmp_path / "b"), "--set", "growth.max_layers=1"]
    assert main(["random", *tiny, *flags]) == 0
    assert "planned and not played: block" in capfd.readouterr().err
    assert summary_of(tmp_path / "b")["unplayed"] == ["block"]
    for arm, told in (("onejump", 1), ("static", 0)):
        flags = ["--out", str(tmp_path / arm), "--set", "growth.min_optimizer_steps=9"]
        assert main([arm, *tiny, *flags]) == 0
        assert capfd.readouterr().err.count("holds 5 steps after a graft, and growth.min_optimizer_steps is 9") == told
