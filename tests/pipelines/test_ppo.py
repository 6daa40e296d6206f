"""`esper ppo` end to end: on the law, on text over real Ray workers, through a worker's death, and resumed.

Needs a local Ray cluster, which the pipeline starts. Alone: `pytest tests/pipelines/test_ppo.py`.
"""

import json

import pytest

from esper.pipelines import gardener, ppo, train
from esper.pipelines.job import Job
from esper.platform import cluster
from esper.platform.spec import load_spec

SMALL = ["--set", "ppo.decisions=16", "--set", "ppo.minibatch=8", "--set", "ppo.epochs=2"]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_on_the_law_then_resumed_then_played(tiny, client, tmp_path, capfd):
    out = tmp_path / "law"
    assert ppo.main(["--surrogate", *tiny, *SMALL, "--set", "ppo.iterations=2", "--out", str(out)]) == 0
    summary = summary_of(out)
    assert {"iterations", "episodes", "decisions", "episode_return_mean", "checkpoint", "mlflow"} <= set(summary)
    assert summary["iterations"] == len(summary["history"]) == 2
    run = client().get_run(summary["mlflow"])
    assert {"return_mean", "entropy", "explained_variance", "wait", "kl"} <= set(run.data.metrics)
    assert "iteration 2/2" in capfd.readouterr().err

    more = tmp_path / "more"
    resume = ["--surrogate", "--resume", str(out), "--set", "ppo.iterations=3", "--out", str(more)]
    assert ppo.main([*resume, *tiny[2:]]) == 0
    assert [metrics["iteration"] for metrics in summary_of(more)["history"]] == [3]

    assert train.main(["ppo", *tiny, "--policy", str(more), "--out", str(tmp_path / "played")]) == 0
    assert summary_of(tmp_path / "played")["arm"] == "ppo"

    assert ppo.main(["--resume", str(out), *tiny[2:], "--set", "data.tokenizer=bpe:300"]) == 2
    assert "ask for 'char'" in capfd.readouterr().err


def test_resume_refuses_shards_of_another_tokenizer(tiny, text_file, tmp_path, capfd):
    out = tmp_path / "law"
    assert ppo.main(["--surrogate", *tiny, *SMALL, "--set", "ppo.iterations=1", "--out", str(out)]) == 0
    other = ["--data", str(text_file), "--set", "data.tokenizer=bpe:260"]
    assert ppo.main(["--resume", str(out), *other, "--out", str(tmp_path / "no")]) == 2
    assert "was trained on tokenizer 'char'" in capfd.readouterr().err
    assert not (tmp_path / "no" / "summary.json").exists()


def test_on_text_a_dead_worker_costs_its_episode_and_no_more(tiny, tiny_spec, shards, tmp_path, monkeypatch):
    """Two real workers train GPTs; one is killed in mid-episode; training goes on to its planned end."""
    import ray

    class Deadly(gardener.RayFleet):
        calls = 0

        def submit(self, worker, method, *args):
            super().submit(worker, method, *args)
            self.calls += 1
            if self.calls == 7:  # both episodes are under way
                ray.kill(self._actors[worker], no_restart=False)

    monkeypatch.setattr(gardener, "RayFleet", Deadly)
    spec = tiny_spec.model_copy(
        update={
            "ppo": tiny_spec.ppo.model_copy(update={"iterations": 2, "decisions": 32, "minibatch": 16, "epochs": 2}),
            "budget": tiny_spec.budget.model_copy(update={"amount": 200}),
        }
    )
    with cluster.session():
        summary = gardener.train_gardener(Job(spec, shards, tmp_path / "out"), tmp_path / "out", seed=0)
    assert summary["iterations"] == len(summary["history"]) == 2
    assert summary["history"][-1]["failures"] >= 1  # and the calls that found it restarting
    assert all(metrics["episode_length"] == 8 for metrics in summary["history"])  # whole episodes only
    assert 0 < summary["history"][-1]["busy"] <= 1


@pytest.mark.slow
def test_it_learns_on_the_law(tmp_path):
    """30 iterations on tinystories-char's law: the mean return of the last five beats that of the first three."""
    spec = load_spec("tinystories-char", ["ppo.iterations=30"])
    with cluster.session():
        job = Job(spec, tmp_path, tmp_path / "out")
        history = gardener.train_gardener(job, job.out, seed=0, surrogate=True)["history"]
    returns = [metrics["return_mean"] for metrics in history]
    assert sum(returns[-5:]) / 5 > sum(returns[:3]) / 3 + 0.05
