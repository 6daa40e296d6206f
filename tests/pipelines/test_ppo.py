"""`esper ppo` end to end: on laws, on text over real Ray workers, through deaths of workers and of itself, and resumed.

Needs a local Ray cluster, which the pipeline starts. Alone: `pytest tests/pipelines/test_ppo.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from esper.pipelines import ppo, train
from esper.pipelines.common.run_folder import Job
from esper.pipelines.controllers import training
from esper.platform.storage import alone
from esper.policies.simic import runner as runners

pytestmark = pytest.mark.usefixtures("one_ray")

SMALL = ["--set", "ppo.decisions=16", "--set", "ppo.minibatch=8", "--set", "ppo.epochs=2"]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def points(client, run: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client().get_metric_history(run, key)]


def test_on_laws_then_resumed_in_place_then_played(tiny, client, tmp_path, capfd, monkeypatch):
    out = tmp_path / "law"
    assert ppo.main(["--surrogate", *tiny, *SMALL, "--set", "ppo.iterations=2", "--out", str(out)]) == 0
    summary = summary_of(out)
    assert {"iterations", "episodes", "decisions", "episode_return_mean", "checkpoint", "mlflow"} <= set(summary)
    assert summary["iterations"] == len(summary["history"]) == 2
    assert sorted(int(path.stem) for path in (out / "episodes").iterdir()) == summary["in_flight"]
    assert (out / "training.png").stat().st_size > 10_000
    run = client().get_run(summary["mlflow"])
    assert {"return_mean", "entropy", "explained_variance", "wait", "kl", "clip_fraction"} <= set(run.data.metrics)
    assert "iteration 2/2" in capfd.readouterr().err

    assert ppo.main(["--resume", str(out)]) == 2
    assert "has its 2 iterations" in capfd.readouterr().err

    assert ppo.main(["--resume", str(out), "--set", "ppo.iterations=3"]) == 0
    after = summary_of(out)
    assert [metrics["iteration"] for metrics in after["history"]] == [1, 2, 3]
    assert after["history"][:2] == summary["history"]
    assert after["decisions"] == summary["decisions"] + after["history"][2]["decisions"]
    assert after["surrogate"]  # as it was, without saying so again
    assert after["mlflow"] == summary["mlflow"]
    assert [step for step, _ in points(client, after["mlflow"], "return_mean")] == [1, 2, 3]

    # Another store has had nothing of it: what is left to do is to send it everything.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    capfd.readouterr()
    assert ppo.main(["--resume", str(out)]) == 0
    assert "MLflow has had everything" in capfd.readouterr().err
    other = MlflowClient(f"sqlite:///{tmp_path}/other.db")
    found = other.search_runs([other.get_experiment_by_name("esper-controllers").experiment_id])[0].info
    run = found.run_id
    assert found.end_time == after["history"][-1]["time"]
    assert points(lambda: other, run, "return_mean") == points(client, after["mlflow"], "return_mean")
    assert {file.path for file in other.list_artifacts(run)} == {"summary.json", "training.png", "policy"}
    assert ppo.main(["--resume", str(out)]) == 2
    assert ppo.main(["--resume", str(out), "--set", "ppo.entropy=0.5"]) == 2

    (out / "summary.json").unlink()  # as if it had died right at its end
    assert ppo.main(["--resume", str(out)]) == 0
    assert summary_of(out)["history"] == after["history"]

    assert train.main(["ppo", *tiny, "--policy", str(out), "--out", str(tmp_path / "played")]) == 0
    assert summary_of(tmp_path / "played")["arm"] == "ppo"


def test_what_a_resumed_training_does_not_take(tiny, tmp_path, capfd):
    out = tmp_path / "law"
    assert ppo.main(["--surrogate", *tiny, *SMALL, "--set", "ppo.iterations=1", "--out", str(out)]) == 0
    newest = out / "checkpoints" / "000001"
    for arguments, sentence in (
        (["--resume", str(out), "--seed", "1"], "leave out --seed"),
        (["--resume", str(out), "--set", "host.n_embd=8"], "only keys of ppo and fleet may change"),
        (["--resume", str(tmp_path)], "holds no checkpoint"),
        (["--resume", str(out), "--set", "ppo.iterations=5", "--set", "ppo.hidden=8"], "ppo.hidden, the network's own"),
    ):
        capfd.readouterr()
        assert ppo.main(arguments) == 2
        assert sentence in capfd.readouterr().err
    with alone(out):
        assert ppo.main(["--resume", str(out), "--set", "ppo.iterations=5"]) == 2
    assert "another process works in" in capfd.readouterr().err
    card = json.loads((newest / "policy" / "policy.json").read_text())
    (newest / "policy" / "policy.json").write_text(json.dumps({**card, "extra": {"mine": 1}}))
    assert ppo.main(["--resume", str(out), "--set", "ppo.iterations=5"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_on_text_every_decision_is_learned_from_once_though_workers_die(tiny, tiny_spec, shards, tmp_path, monkeypatch):
    """Two real workers train GPTs; one is killed in mid-episode and another takes its episode up."""
    import ray

    class Deadly(training.RayFleet):
        calls = 0

        def submit(self, worker, order):
            super().submit(worker, order)
            self.calls += 1
            if self.calls == 7:  # both episodes are under way
                ray.kill(self._actors[worker])

    learned = []
    sample = runners.SimicEnvRunner.sample

    def noting(self, **kwargs):
        episodes = sample(self, **kwargs)
        learned.extend((int(episode.id_), k) for episode in episodes for k in range(len(episode)))
        return episodes

    monkeypatch.setattr(training, "RayFleet", Deadly)
    monkeypatch.setattr(runners.SimicEnvRunner, "sample", noting)
    spec = tiny_spec.model_copy(
        update={
            "ppo": tiny_spec.ppo.model_copy(update={"iterations": 2, "decisions": 32, "minibatch": 16, "epochs": 2}),
            "budget": tiny_spec.budget.model_copy(update={"amount": 200}),
        }
    )
    job = Job(spec, shards, tmp_path / "out")
    job.begin()
    summary = training.train_controller(job, job.out, seed=0)
    last = summary["history"][-1]
    assert summary["iterations"] == len(summary["history"]) == 2
    assert last["failures"] == 1
    assert last["dropped"] == last["refused"] == 0
    assert len(learned) == len(set(learned)) == summary["decisions"]
    numbers = {number for number, _ in learned}
    assert learned == [(number, k) for number in dict.fromkeys(number for number, _ in learned) for k in range(8)]
    assert sorted({*numbers, *summary["in_flight"]}) == list(range(len(numbers) + len(summary["in_flight"])))
    assert 0 < last["busy"] <= 1
    assert 0 < last["waiting"] < 1

    # It does not go on with other text.
    (tmp_path / "out" / "checkpoints" / "000002" / "policy" / "policy.json").write_text(
        json.dumps(other_text(tmp_path / "out" / "checkpoints" / "000002" / "policy" / "policy.json"))
    )
    assert ppo.main(["--resume", str(job.out), "--set", "ppo.iterations=3"]) == 2


def other_text(card: Path):
    values = json.loads(card.read_text())
    return {**values, "extra": {**values["extra"], "fingerprint": "another"}}


def start(arguments, tmp_path):
    """The real command, in a process of its own."""
    command = [sys.executable, "-m", "esper.pipelines.ppo", *arguments]
    with (tmp_path / "log").open("ab") as log:
        return subprocess.Popen(command, stderr=log, stdout=log, cwd=tmp_path, env=os.environ | {"TERM": "dumb"})


def wait_for(condition, process, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_killed_and_stopped_it_goes_on_with_nothing_lost_or_doubled(tiny, client, tmp_path):
    """SIGKILL in mid-training, then SIGTERM: after each `--resume`, each iteration once, here and in MLflow."""
    out = tmp_path / "out"
    begin = ["--surrogate", *tiny, "--set", "ppo.decisions=64", "--set", "ppo.iterations=8", "--out", str(out)]
    checkpoints = lambda: sorted(int(path.name) for path in (out / "checkpoints").glob("0*"))  # noqa: E731
    process = start(begin, tmp_path)
    wait_for(lambda: out.exists() and checkpoints() and checkpoints()[-1] >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = checkpoints()[-1]

    process = start(["--resume", str(out)], tmp_path)
    wait_for(lambda: checkpoints()[-1] > reached, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert f"go on with: esper ppo --resume {out}" in (tmp_path / "log").read_text()
    assert not (out / "summary.json").exists()

    assert ppo.main(["--resume", str(out)]) == 0
    summary = summary_of(out)
    assert [metrics["iteration"] for metrics in summary["history"]] == list(range(1, 9))
    assert summary["decisions"] == sum(metrics["decisions"] for metrics in summary["history"])
    expected = [(metrics["iteration"], metrics["return_mean"]) for metrics in summary["history"]]
    assert points(client, summary["mlflow"], "return_mean") == expected
    assert checkpoints() == [5, 8]


def test_workers_that_do_not_fit_are_refused(tiny, tmp_path, capfd):
    for setting, sentence in (
        ("fleet.cpus=999", "does not fit a cluster"),
        ("fleet.workers=999", "holds"),
        ("fleet.storage=nonsense://there", "fleet.storage is 'nonsense://there', which cannot be used"),
    ):
        assert ppo.main([*tiny, *SMALL, "--set", setting, "--out", str(tmp_path / setting.replace("/", ""))]) == 2
        assert sentence in capfd.readouterr().err
