"""`esper policy`: what a checkpoint is, how it does beside the other arms, and its median schedule. Without Ray."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from esper.pipelines import policy as pipeline
from esper.pipelines.common.play import play
from esper.platform.spec import load_spec
from esper.policies.arms import ArmInputs, make_policy
from esper.policies.schedule import SchedulePolicy
from esper.policies.simic.policy import FILE, SimicPolicy
from esper.workers.run import GrowthRun
from tests.pipelines.helpers import made_net, read

EXTRA = {"preset": "tinystories-char", "iterations": 2, "episodes": 30.0, "decisions": 1240.0, "seed": 7}
FEW = ["--set", "budget.decisions=8", "--episodes", "6"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The folder of a `ppo` run whose newest policy grafts here and there."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "ppo"
    for iteration in (1, 2):
        file = run / "checkpoints" / f"{iteration:06d}" / FILE
        SimicPolicy(made_net(iteration + 1, 3.0)).save(file, {**EXTRA, "iterations": iteration})
    (run / "spec.json").write_text(load_spec("tinystories-char").model_dump_json())
    return run


def test_info_says_what_it_is_without_ray(trained):
    code = "import sys; from esper.pipelines.policy import main; sys.exit(main(sys.argv[1:]) or 'ray' in sys.modules)"
    command = [sys.executable, "-W", "error", "-c", code, "info", str(trained)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    file = trained / "checkpoints" / "000002" / FILE
    assert told == {
        "format": "simic-3",
        "telemetry version": "3",
        "hidden": "16",
        "parameters": str(sum(p.numel() for p in made_net(0, 0).parameters())),
        **{name: str(value) for name, value in EXTRA.items()},
        "hosts": "transformer",
        "weights": f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}",
        "file": str(file),
    }


def test_evaluate_sets_the_arms_side_by_side(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert pipeline.main(["evaluate", str(trained), *FEW, "--out", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    arms = ["static", "random", "schedule", "tamiyo", "lag", "planner", "openloop", "ppo", "bound"]
    assert [line.split()[0] for line in table[1:]] == arms
    result = read(out, "evaluation.json")
    rows = {row["arm"]: row for row in result["rows"]}
    losses = {
        arm: np.array([i["arms"][arm]["val_loss"] for i in result["instances"].values()])
        for arm in result["instances"]["0"]["arms"]
    }
    bounds = np.array([instance["bound"] for instance in result["instances"].values()])
    assert len(bounds) == 6
    for arm, reached in losses.items():
        assert (reached >= bounds - 1e-9).all()
        gap, beyond = (losses["schedule"] - bounds).mean(), (reached - bounds).mean()
        told = [rows[arm][key] for key in ("loss", "to_bound", "closed")]
        assert told == pytest.approx([reached.mean(), beyond, 1 - beyond / gap])
    assert rows["schedule"]["difference"] is None
    low, high = stats.ttest_rel(losses["ppo"], losses["schedule"]).confidence_interval(0.95)
    told = rows["ppo"]["difference"]
    assert (told["mean"] - told["half_width_95"], told["mean"] + told["half_width_95"]) == pytest.approx((low, high))
    assert rows["static"]["grafts"] == 0 < rows["ppo"]["grafts"]

    again = tmp_path / "again"
    assert pipeline.main(["evaluate", str(trained), *FEW, "--arms", "random,schedule", "--out", str(again)]) == 0
    repeated = read(again, "evaluation.json")
    for id, instance in result["instances"].items():
        assert all(instance["arms"][arm] == repeated["instances"][id]["arms"][arm] for arm in ("random", "ppo"))


def test_evaluate_on_text_trains_gpts(trained, tiny, tmp_path, capsys, monkeypatch):
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    plan.write_text('[{"at": 0.25, "blueprint": "ffn"}]')
    command = ["evaluate", str(trained), *tiny, "--episodes", "2", "--schedule", str(plan), "--out", str(out)]
    command += ["--set", "budget.amount=80"]
    (tmp_path / "rows.py").write_text("def last(telemetry):\n    return telemetry.legal()[-1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert pipeline.main([*command, "--arms", "static,schedule,width,rows:last"]) == 0
    result = read(out, "evaluation.json")
    assert result["on"] == "text"
    assert [row["arm"] for row in result["rows"]] == ["static", "schedule", "width", "rows:last", "ppo"]
    assert all(row["to_bound"] is None for row in result["rows"])
    assert [len(i["arms"]["schedule"]["grafts"]) for i in result["instances"].values()] == [1, 1]
    assert [len(i["arms"]["width"]["grafts"]) for i in result["instances"].values()] == [3, 3]
    assert "bound" not in capsys.readouterr().out


def test_distill_writes_a_schedule_that_plays_on_text(trained, tiny_spec, tokens, tmp_path, capfd):
    plan = tmp_path / "plan.json"
    assert pipeline.main(["distill", str(trained), "--episodes", "12", "--out", str(plan)]) == 0
    told = capfd.readouterr()
    entries = SchedulePolicy.load(plan).entries
    assert entries
    assert len(told.out.splitlines()) == len(entries)
    assert "not looking at the run costs" in told.err
    run = GrowthRun(tiny_spec, tokens)
    run.reset(seed=0)
    grafts = play(run, make_policy("schedule", ArmInputs(schedule=plan)), arm="schedule")["grafts"]
    assert {graft["blueprint"] for graft in grafts} == {entry.blueprint for entry in entries}
