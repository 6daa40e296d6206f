"""`esper ppo` end to end: on laws, on text over real Ray workers, through workers' deaths and its own, resumed."""

import math
import pickle
import signal
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from esper.pipelines import policy, ppo, train
from esper.pipelines.controllers import rounds, training
from esper.platform import checkpoint
from esper.platform.journal import read_entries
from esper.platform.law_file import FittedLaws
from esper.platform.ledger import AXES
from esper.platform.spec import load_spec
from esper.policies.simic import clone
from esper.policies.simic.policy import SimicPolicy
from esper.workers.instances import instance_set
from esper.workers.laws.fit import annealed_losses
from esper.workers.laws.surrogate import drawn_laws
from esper.workers.observe import telemetry_space
from tests.pipelines.helpers import Harm, made_net, sets, start, summary_of, wait_for

SMALL = sets("ppo.decisions=16", "ppo.minibatch=8", "ppo.epochs=2", "ppo.held_out=2")


def more(iterations: int) -> list[str]:
    return sets(f"ppo.iterations={iterations}")


def points(client, run: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run, key)]


@pytest.fixture
def laws(tiny, tmp_path):
    """Trains on laws, in a folder; returns it."""

    def trained(iterations: int, name: str = "law", *flags: str) -> Path:
        out = tmp_path / name
        assert ppo.main(["--surrogate", *tiny[:2], *SMALL, *more(iterations), *flags, "--out", str(out)]) == 0
        return out

    return trained


def test_on_laws_then_resumed_in_place_then_played(laws, tiny, client, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:  # as if killed before its first checkpoint
        patch.setattr(ppo, "train", lambda folder, inputs: None)
        out = laws(2)
    assert ppo.main(["--resume", str(out)]) == 0
    summary = summary_of(out)
    assert summary["iterations"] == len(summary["history"]) == 2
    kept = {entry["episode"] for path in (out / "episodes").iterdir() for entry in read_entries(path)}
    assert kept >= set(summary["in_flight"])
    assert (out / "training.png").stat().st_size > 10_000
    assert summary["spent"] == dict.fromkeys(AXES, 0.0)  # no GPT was trained
    run = client().get_run(summary["mlflow"])
    assert {"return_mean", "entropy", "explained_variance", "wait", "kl", "held_out_loss"} <= set(run.data.metrics)
    assert "iteration 2/2" in capfd.readouterr().err
    losses = summary["held_out_losses"]
    assert set(losses) == {"1", "2"}
    assert losses[str(summary["best_iteration"])] == min(losses.values())
    best = Path(summary["checkpoint"])
    assert int(best.name) == summary["best_iteration"]
    assert (out / "policy.safetensors").read_bytes() == (best / "policy.safetensors").read_bytes()
    assert ppo.main(["--resume", str(out), *more(3)]) == 0
    after = summary_of(out)
    assert [metrics["iteration"] for metrics in after["history"]] == [1, 2, 3]
    assert after["history"][:2] == summary["history"]
    assert not any("anchor_kl" in metrics for metrics in after["history"])  # as there is no anchor
    assert after["decisions"] == summary["decisions"] + after["history"][2]["decisions"]
    assert after["surrogate"]  # as it was, without saying so again
    assert after["mlflow"] == summary["mlflow"]
    assert [step for step, _ in points(client(), after["mlflow"], "return_mean")] == [1, 2, 3]

    # Another store has had nothing of it: what is left to do is to send it everything.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    capfd.readouterr()
    assert ppo.main(["--resume", str(out)]) == 0
    assert "MLflow has had everything" in capfd.readouterr().err
    other = MlflowClient(f"sqlite:///{tmp_path}/other.db")
    [found] = [run.info for run in other.search_runs([each.experiment_id for each in other.search_experiments()])]
    assert found.status == "FINISHED"
    assert points(other, found.run_id, "return_mean") == points(client(), after["mlflow"], "return_mean")
    artifacts = {file.path for file in other.list_artifacts(found.run_id)}
    assert artifacts >= {"summary.json", "training.png", "policy.safetensors"}
    (out / "summary.json").unlink()  # as if it had died right at its end
    assert ppo.main(["--resume", str(out)]) == 0
    assert summary_of(out)["history"] == after["history"]
    assert train.main(["ppo", *tiny, "--policy", str(out), "--out", str(tmp_path / "played")]) == 0
    assert summary_of(tmp_path / "played")["arm"] == "ppo"


@pytest.fixture
def short_lessons(monkeypatch):
    for name, number in {"LESSONS": 2, "EPISODES": 4, "HELD_OUT": 2}.items():
        monkeypatch.setattr(rounds, name, number)
    monkeypatch.setattr(clone, "STEPS", 20)


@pytest.fixture
def fitted(tiny_spec, tmp_path) -> Path:
    """A file of laws, as if fitted to runs of the tiny preset."""
    path = tmp_path / "laws.json"
    path.write_text(drawn_laws(tiny_spec, range(9)).model_dump_json())
    return path


def resumed_to_the_bit(laws, *flags: str) -> dict:
    """Check that a training is the same where it was resumed: weights, optimizer, KL coefficient, metrics; its summary.

    Whatever lies in the folder, nothing of it is unpickled.
    """
    straight, resumed = laws(4, "straight", *flags), laws(2, "resumed", *flags)
    for name in ("algorithm_state.pkl", "class_and_ctor_args.pkl", "state.pkl"):
        (resumed / "checkpoints" / "000002" / name).write_bytes(pickle.dumps(Harm(Path.touch, resumed / "exploded")))
    assert ppo.main(["--resume", str(resumed), *more(4)]) == 0
    assert not (resumed / "exploded").exists()
    for name in ("policy", "learner"):
        path = Path("checkpoints") / "000004" / f"{name}.safetensors"
        one, other = (checkpoint.read(out / path)[1] for out in (straight, resumed))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    timed = {"time", "sample_seconds", "learn_seconds", "episode_seconds", "episode_seconds_max"}
    one, other = (summary_of(out)["history"] for out in (straight, resumed))
    for metrics in (*one, *other):
        assert "kl_coefficient" in metrics
        for name in timed:
            metrics.pop(name, None)
    assert one == other
    return summary_of(straight)


@pytest.mark.usefixtures("short_lessons")
def test_it_begins_with_a_clone_of_the_planner_and_resumed_is_the_same_to_the_bit(laws, fitted, tmp_path, capfd):
    summary, out = resumed_to_the_bit(laws, "--laws", str(fitted)), tmp_path / "straight"
    told = capfd.readouterr().err
    assert "clone   the planner by 2 lessons of 4 surrogate episodes" in told
    [judged] = summary["clones"]
    assert f"agrees in {judged['agreement']:.0%} of its decisions" in told
    assert judged["clone_loss"] >= judged["planner_loss"] - 0.05
    assert set(summary["held_out_losses"]) == set("01234")  # the clone is a candidate too
    first, anchor = (SimicPolicy.load(out / path) for path in ("checkpoints/000000", "rounds/000000"))
    torch.testing.assert_close(first.net.state_dict(), anchor.net.state_dict(), rtol=0, atol=0)
    later = SimicPolicy.load(out / "checkpoints" / "000001")
    assert all(0 < metrics["anchor_kl"] < 0.5 for metrics in summary["history"])
    assert any((a != b).any() for a, b in zip(later.net.parameters(), anchor.net.parameters(), strict=True))


def test_it_begins_with_a_given_policy_and_stays_near_to_it(laws, tmp_path, refused):
    given = tmp_path / "given.safetensors"
    SimicPolicy(made_net(1, 1.0)).save(given, {"preset": "another"})
    summary = summary_of(out := laws(2, "tuned", "--init-from", str(given)))
    assert set(summary["held_out_losses"]) == {"0", "1", "2"}
    paths = (out / "checkpoints" / "000000", given, out / "checkpoints" / "000002")
    first, kept, last = (SimicPolicy.load(path).net.state_dict() for path in paths)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    assert any((kept[name] != last[name]).any() for name in kept)
    near = [metrics["anchor_kl"] for metrics in summary["history"]]
    assert all(0 < kl < 0.5 for kl in near)
    line = ["--surrogate", "--init-from", given, "--out", tmp_path / "x"]
    refused(ppo.main, [*line, "--laws", given], "--laws begins with a clone of the planner, --init-from with a policy")
    given.write_bytes(b"")
    refused(ppo.main, line, str(given))
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("short_lessons", "one_ray")
def test_rounds_fit_the_laws_to_what_was_learned_from_and_clone_anew(tiny, tmp_path, monkeypatch, refused, capfd):
    path, runs, out = tmp_path / "laws.json", tmp_path / "runs", tmp_path / "out"
    for layers in (1, 2, 3):
        more_of = sets(f"host.n_layer={layers}", "budget.cooldowns=[0.5]")
        assert train.main(["static", *tiny, "--out", str(runs / f"s{layers}"), *more_of]) == 0
    assert policy.main(["fit", str(runs), "--out", str(path)]) == 0
    small = sets("ppo.iterations=2", "ppo.decisions=16", "ppo.minibatch=16", "ppo.epochs=1", "ppo.held_out=1")
    command = [*tiny, *small, *sets("budget.amount=160", "fleet.cpus=2"), "--laws", str(path)]  # a process at a time
    note = rounds.Rounds.note

    def noted_then_dead(self, iteration, episodes):
        note(self, iteration, episodes)
        assert iteration < 2, "died before the second round's checkpoint"

    with monkeypatch.context() as patch:
        patch.setattr(rounds.Rounds, "note", noted_then_dead)
        with pytest.raises(AssertionError, match="died"):
            ppo.main([*command, "--rounds", "2", "--out", str(out)])
    assert "laws    fitted anew" in capfd.readouterr().err
    clones = [SimicPolicy.load(path).net.state_dict() for path in sorted(out.glob("rounds/*/policy.safetensors"))]
    with monkeypatch.context() as patch:
        patch.setattr(rounds.Lessons, "clone", lambda self: pytest.fail("cloned again"))
        assert ppo.main(["--resume", str(out)]) == 0
    kept = [SimicPolicy.load(path).net.state_dict() for path in sorted(out.glob("rounds/*/policy.safetensors"))]
    torch.testing.assert_close(kept, clones, rtol=0, atol=0)
    assert [metrics["iteration"] for metrics in summary_of(out)["history"]] == [1, 2]
    before, between, after = (FittedLaws.read(each) for each in (path, *sorted(out.glob("rounds/*/laws.json"))))
    entries = read_entries(out / "runs.jsonl")
    assert {entry["iteration"] for entry in entries} == {1, 2}
    sound = [entry for entry in entries if annealed_losses(entry["summary"])]
    assert before.runs == 3
    assert between.runs == 3 + sum(entry["iteration"] == 1 for entry in sound)
    assert after.runs == 3 + len(sound) > between.runs
    assert [each["iterations"] for each in summary_of(out)["clones"]] == [0, 1]
    edits = {"nowhere": {"folder": ""}, "text": {"text": "another"}, "other": {"preset": "demo"}, "fewer": {"runs": 2}}
    for name, edit in edits.items():
        (tmp_path / f"{name}.json").write_text(before.model_copy(update=edit).model_dump_json())
    nowhere, text, other, fewer = (tmp_path / f"{name}.json" for name in edits)
    for arguments, sentence in (
        ([*command, "--rounds", "9"], "--rounds is 9, but ppo.iterations only 2"),
        ([*tiny, "--rounds", "2"], "--rounds fits the laws of --laws FILE anew: give them, or leave it out"),
        ([*command[:2], "--surrogate", "--laws", path, "--rounds", "2"], "--rounds needs episodes on text"),
        ([*tiny, *small, "--laws", nowhere, "--rounds", "2"], "fit it again, with `esper policy fit"),
        ([*tiny, *small, "--laws", text, "--rounds", "2"], "and they are of another: leave it out"),
        ([*tiny, *small, "--laws", fewer, "--rounds", "2"], "has 3 now: fit it again, with `esper policy fit"),
        ([*tiny, *small, "--laws", other], "the laws were fitted to runs of preset 'demo'"),
    ):
        refused(ppo.main, arguments, sentence)


@pytest.mark.usefixtures("one_ray")
def test_what_is_refused(laws, tiny, tmp_path, refused):
    out, text = laws(1), tmp_path / "text.txt"
    go_on = ["--resume", out, *more(5)]
    for arguments, sentence in (
        (["--surrogate", "--data", text], f"leave out --data {text}"),
        (["--resume", out], "has its 1 iteration"),
        (["--resume", out, "--set", "host.n_embd=8"], "only keys of ppo and fleet may change"),
        (["--resume", out, "--set", "ppo.entropy=0.5"], ""),
        (["--resume", tmp_path], "holds no work of `esper ppo`"),
        ([*go_on, "--set", "ppo.hidden=8"], "ppo.hidden, the network's own"),
        ([*tiny, *SMALL, "--out", tmp_path / "a", "--set", "fleet.cpus=999"], "does not fit a cluster"),
        ([*tiny, *SMALL, "--out", tmp_path / "b", "--set", "fleet.workers=999"], "holds"),
        ([*tiny, *SMALL, "--out", tmp_path / "d", "--set", "device=cuda"], "fleet.gpus is 0"),
        (["--surrogate", "--out", tmp_path / "e", "--set", "ppo.learner_gpus=0.5"], "1 GPU asked for"),
        ([*tiny, *SMALL, "--out", tmp_path / "c", "--set", "fleet.storage=nonsense://there"], "nonsense://there"),
    ):
        refused(ppo.main, arguments, sentence)
    newest = out / "checkpoints" / "000001"
    for name in ("policy", "learner"):
        path = newest / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Harm(Path.touch, out / "exploded")))
        refused(ppo.main, go_on, str(newest))
        path.write_bytes(whole)
    assert not (out / "exploded").exists()
    learned = SimicPolicy.load(newest)
    learned.save(newest / "policy.safetensors", {**learned.card["extra"], "key": "another"})
    refused(ppo.main, go_on, "is another training's")
    spec = out / "spec.json"
    spec.write_text(spec.read_text().replace('"n_embd": 16', '"n_embd": 32'))
    refused(ppo.main, go_on, "spec.json")


@pytest.mark.usefixtures("one_ray")
def test_on_text_every_episode_is_learned_from_once_and_all_that_was_spent_is_told(tiny, tmp_path, capfd):
    """Two real workers train GPTs; `test_chaos.py` kills some."""
    out = tmp_path / "out"
    small = sets("ppo.iterations=2", "ppo.decisions=32", "ppo.minibatch=16", "ppo.epochs=2", "ppo.held_out=1")
    assert ppo.main([*tiny, *small, *sets("budget.amount=200", "budget.cooldowns=[0.5]"), "--out", str(out)]) == 0
    summary = summary_of(out)
    last, learned = summary["history"][-1], round(summary["episodes"])
    assert summary["iterations"] == len(summary["history"]) == 2
    assert last["failures"] == last["dropped"] == last["refused"] == 0
    assert f"\nepisode {learned - 1} writes: " in capfd.readouterr().err
    assert 8 * learned == summary["decisions"]
    assert summary["in_flight"] == list(range(learned, learned + len(summary["in_flight"])))
    assert all(0 < last[share] <= 1 for share in ("busy", "learned_share"))
    assert 0 < last["waiting"] < 1

    # Whole episodes, those in flight, and a held-out one for each policy.
    spec = load_spec(out / "spec.json")
    sizes = [instance_set(name, spec, text=True).values() for name in ("train", "tuning")]
    train_steps, tuning_steps = ([math.ceil(200 * each.budget) for each in instances] for instances in sizes)
    assert len(set(train_steps)) > 50  # instances differ
    parts = summary["spent_on"]
    assert parts.keys() == {"learned", "in_flight", "dropped", "held_out"}
    assert parts["learned"]["steps"] == sum(train_steps[:learned])
    assert parts["held_out"]["steps"] == tuning_steps[0] * len(summary["held_out_losses"])
    assert summary["spent"]["steps"] == sum(part["steps"] for part in parts.values())


@pytest.mark.usefixtures("one_ray")
def test_one_fleet_trains_on_two_presets_in_turn_and_goes_on(tiny, shards, tiny_spec, tmp_path, refused):
    """The other has more sites, and another budget; the training is resumed between its iterations."""
    deeper, out = tmp_path / "deeper.json", tmp_path / "out"
    other = tiny_spec.overridden({"growth.max_layers": 6, "budget.amount": 120})
    deeper.write_text(other.model_dump_json(exclude={"preset"}))
    small = sets("ppo.decisions=32", "ppo.minibatch=16", "ppo.epochs=1", "ppo.held_out=2")
    small += sets("budget.amount=160", "fleet.cpus=2")  # a process at a time
    line = [*tiny, *small, *more(1), "--also", f"{deeper}={shards}", "--out", str(out)]
    assert ppo.main(line) == 0
    assert ppo.main(["--resume", str(out), *more(2)]) == 0
    summary, specs = summary_of(out), [load_spec(out / "spec.json"), load_spec(deeper)]
    assert telemetry_space(specs[0]).candidates < telemetry_space(specs[1]).candidates
    learned = round(summary["episodes"])
    instances = [list(instance_set("train", spec, text=True).values()) for spec in specs]
    turns = [(i % 2, instances[i % 2][i // 2]) for i in range(learned)]
    steps = [math.ceil(specs[turn].budget.amount * instance.budget) for turn, instance in turns]
    assert summary["spent_on"]["learned"]["steps"] == sum(steps)
    tuning = [next(iter(instance_set("tuning", spec, text=True).values())).budget for spec in specs]
    held_out = sum(math.ceil(spec.budget.amount * budget) for spec, budget in zip(specs, tuning, strict=True))
    assert summary["spent_on"]["held_out"]["steps"] == held_out * len(summary["held_out_losses"])
    larger = load_spec("digits", ["host.image_size=16"])
    (tmp_path / "larger.json").write_text(larger.model_dump_json(exclude={"preset"}))
    for flags, sentence in (
        (["--surrogate", "--also", "demo"], "--also trains on several presets' own data, and --surrogate is of one"),
        ([*tiny, "--also", "dmo"], "Did you mean 'demo'"),
        ([*tiny, "--also", f"{tmp_path / 'larger.json'}"], "are 8 × 8 × 1, and the host takes 16 × 16 × 1"),
    ):
        refused(ppo.main, flags, sentence)
    plan = out / "inputs" / "plan.json"
    plan.write_text(plan.read_text().replace("fingerprint", "finger"))
    refused(ppo.main, ["--resume", out, *more(3)], "plan.json was changed")


def test_the_best_policy_is_chosen_by_held_out_episodes_that_are_played_once(tmp_path, monkeypatch):
    spec = load_spec("tinystories-char", ["budget.decisions=6", "ppo.held_out=3"])
    for iteration, scale in ((1, 0.0), (3, 3.0)):  # one only waits
        file = tmp_path / "checkpoints" / f"{iteration:06d}" / "policy.safetensors"
        SimicPolicy(made_net(iteration, scale)).save(file)
    played = training.held_out([(spec, None)], tmp_path, 0, lambda: None)
    assert len(played) == 6
    losses = training.mean_losses(played)
    assert losses[3] < losses[1] - 0.1
    diverged = [entry | {"diverged": entry["episode"] == 2} for entry in played]
    assert training.mean_losses(diverged) == {1: float("inf"), 3: float("inf")}
    monkeypatch.setattr(training, "held_out_episode", lambda *_: pytest.fail("played again"))
    assert training.held_out([(spec, None)], tmp_path, 0, lambda: None) == played


def test_whatever_ends_it_it_goes_on_with_nothing_lost_or_doubled(tiny, client, tmp_path):
    """SIGKILL, then SIGTERM: after each `--resume`, each iteration once, here and in MLflow."""
    out = tmp_path / "out"
    checkpoints = lambda: sorted(int(path.name) for path in (out / "checkpoints").glob("0*"))  # noqa: E731
    settings = [*sets("ppo.decisions=64", "ppo.held_out=1"), *more(6)]
    process = start("ppo", ["--surrogate", *tiny[:2], *settings, "--out", str(out)], tmp_path / "log")
    wait_for(lambda: checkpoints()[-1:] >= [2], process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / "checkpoints" / "000001").mkdir(exist_ok=True)  # as if killed while it was being deleted
    reached = checkpoints()[-1]
    process = start("ppo", ["--resume", str(out)], tmp_path / "log")
    wait_for(lambda: checkpoints()[-1] > reached, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    log = (tmp_path / "log").read_text()
    assert f"go on with: esper ppo --resume {out}" in log
    assert "Traceback" not in log
    assert "Ray" not in log  # which laws do not need
    assert not (out / "summary.json").exists()
    assert ppo.main(["--resume", str(out)]) == 0
    summary = summary_of(out)
    assert [metrics["iteration"] for metrics in summary["history"]] == list(range(1, 7))
    assert summary["decisions"] == sum(metrics["decisions"] for metrics in summary["history"])
    expected = [(metrics["iteration"], metrics["return_mean"]) for metrics in summary["history"]]
    assert points(client(), summary["mlflow"], "return_mean") == expected
    assert checkpoints() == [2, 4, 6]
