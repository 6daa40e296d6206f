"""`esper policy`: what a checkpoint is, how it does beside other arms, its median schedule; laws, fitted and used."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from esper.pipelines import policy as pipeline
from esper.pipelines import train
from esper.pipelines.common.play import play
from esper.platform.law_file import FittedLaws
from esper.platform.spec import load_spec
from esper.policies.arms import ArmInputs, make_policy
from esper.policies.schedule import SchedulePolicy
from esper.policies.simic.policy import FILE, SimicPolicy
from esper.workers.run import GrowthRun
from tests.pipelines.helpers import made_net, planned, read, sets, summary_of

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
    played = result["instances"]
    losses = {arm: np.array([i["arms"][arm]["val_loss"] for i in played.values()]) for arm in played["0"]["arms"]}
    bounds = np.array([instance["bound"] for instance in played.values()])
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
    out, plan = tmp_path / "out", planned(tmp_path, {0.25: "ffn"})
    command = ["evaluate", str(trained), *tiny, "--episodes", "2", *plan, "--out", str(out)]
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


@pytest.fixture
def runs(tiny, tmp_path):
    """A folder of ended runs: three static sizes, and one that grew."""
    for layers in (1, 2, 3):
        more = sets(f"host.n_layer={layers}", "budget.cooldowns=[0.5]")
        assert train.main(["static", *tiny, "--out", str(tmp_path / "runs" / f"s{layers}"), *more]) == 0
    assert train.main(["width", *tiny, "--out", str(tmp_path / "runs" / "width"), "--seed", "1"]) == 0
    return tmp_path / "runs"


def test_laws_are_fitted_to_runs_and_played_by(tiny, runs, tmp_path, capfd, refused):
    path, out = tmp_path / "laws.json", tmp_path / "out"
    assert pipeline.main(["fit", str(runs), "--out", str(path)]) == 0
    told, laws = capfd.readouterr().err, FittedLaws.read(path)
    assert (laws.preset, laws.tokenizer, laws.runs, laws.grown, laws.losses) == ("tiny", "char", 4, 1, 7)
    assert laws.held_out is not None
    assert 0 < laws.held_out < 1
    assert f"{laws.residual:.4f} nats (rms) over 7 annealed losses" in told
    assert f"{laws.held_out:.4f} over growing runs" in told
    assert train.main(["planner", *tiny, "--laws", str(path), "--out", str(out), "--seed", "3"]) == 0
    assert "notice" not in capfd.readouterr().err
    grafts = summary_of(out)["grafts"]
    assert all("expected to end at" in graft["reason"] for graft in grafts)
    (out / "summary.json").unlink()  # as if killed before it was written
    assert train.main(["--resume", str(out)]) == 0
    assert summary_of(out)["grafts"] == grafts
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text": "another"}))
    more = ["--laws", str(path), "--out", str(tmp_path / "other"), *sets("host.n_head=4")]
    assert train.main(["planner", *tiny, *more]) == 0
    assert "was fitted to runs that differ from these in host.n_head, the text" in capfd.readouterr().err
    refused(pipeline.main, ["fit", runs / "width", "--out", tmp_path / "w"], "laws are fitted to 3 sizes or more")
    (runs / "s1" / "spec.json").write_text((runs / "s1" / "spec.json").read_text().replace('"tiny"', '"tinier"'))
    refused(pipeline.main, ["fit", runs, "--out", tmp_path / "w"], "are of several: tinier, tiny: name others")
    assert not (tmp_path / "w").exists()
