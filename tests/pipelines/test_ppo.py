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
    assert ppo.main(["--resume", str(out), "--set", "ppo.iterations=3", "--out", str(more)]) == 0
    after = summary_of(more)
    assert [metrics["iteration"] for metrics in after["history"]] == [3]
    assert after["decisions"] == summary["decisions"] + after["history"][0]["decisions"]
    assert after["surrogate"]  # as it was, without saying so again

    assert train.main(["ppo", *tiny, "--policy", str(more), "--out", str(tmp_path / "played")]) == 0
    assert summary_of(tmp_path / "played")["arm"] == "ppo"

    assert ppo.main(["--resume", str(out), "--out", str(tmp_path / "no")]) == 2
    assert "has its 2 iterations" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_on_text_a_dead_worker_costs_its_episode_and_no_more(
    tiny, tiny_spec, shards, text_file, tmp_path, monkeypatch, capfd
):
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
        job = Job(spec, shards, tmp_path / "out")
        job.begin()
        summary = gardener.train_gardener(job, job.out, seed=0)
    assert summary["iterations"] == len(summary["history"]) == 2
    assert summary["history"][-1]["failures"] >= 1  # and the calls that found it restarting
    assert all(metrics["episode_length"] == 8 for metrics in summary["history"])  # whole episodes only
    assert 0 < summary["history"][-1]["busy"] <= 1
    assert 0 < summary["history"][-1]["waiting"] < 1

    # Its checkpoint does not go on with shards of another tokenizer.
    other = ["--data", str(text_file), "--set", "data.tokenizer=bpe:260", "--set", "ppo.iterations=3"]
    assert ppo.main(["--resume", str(job.out), *other, "--out", str(tmp_path / "no")]) == 2
    assert "was trained on tokenizer 'char'" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_workers_that_do_not_fit_are_refused(tiny, tmp_path, capfd):
    for setting, sentence in (("fleet.cpus=999", "does not fit a cluster"), ("fleet.workers=999", "holds")):
        assert ppo.main([*tiny, *SMALL, "--set", setting, "--out", str(tmp_path / setting)]) == 2
        assert sentence in capfd.readouterr().err


@pytest.mark.slow
def test_it_learns_on_the_law(tmp_path):
    """30 iterations on tinystories-char's law: the mean return of the last five beats that of the first three."""
    spec = load_spec("tinystories-char", ["ppo.iterations=30"])
    with cluster.session():
        job = Job(spec, tmp_path, tmp_path / "out")
        history = gardener.train_gardener(job, job.out, seed=0, surrogate=True)["history"]
    returns = [metrics["return_mean"] for metrics in history]
    assert sum(returns[-5:]) / 5 > sum(returns[:3]) / 3 + 0.05
