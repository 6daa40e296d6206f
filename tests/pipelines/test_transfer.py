"""`esper transfer` end to end on a tiny GPT: trainings, sweep, and what it says of transfer; killed on the way."""

import json

import pytest

from esper.pipelines import ppo, transfer
from esper.policies.simic.policy import SimicPolicy
from tests.pipelines.helpers import made_net, sets, summary_of

pytestmark = [pytest.mark.usefixtures("one_ray"), pytest.mark.slow]
SMALL = sets("budget.amount=40", "budget.decisions=8", "ppo.epochs=1", "ppo.held_out=0")
LINE = ["--episodes", "2", "--seeds", "5", "--tuning-seeds", "1", "--arms", "static,onejump"]


def test_a_policy_from_images_is_compared_with_one_from_here(tiny, tmp_path, monkeypatch, capfd):
    given, out = tmp_path / "given.safetensors", tmp_path / "out"
    SimicPolicy(made_net(3, 3.0)).save(given, {"preset": "digits", "hosts": ["resnet"]})
    line = ["--policy", str(given), "--to", tiny[1], *tiny[2:], *LINE, *SMALL, "--out", str(out)]
    train, done = ppo.run, []

    def once(arguments):
        assert not done, "killed after the first training"
        done.append(train(arguments))

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "run", once)
        with pytest.raises(AssertionError, match="killed"):
            transfer.main(line)
    first = (out / "fine-tuned" / "policy.safetensors").read_bytes()
    assert transfer.main(["--resume", str(out)]) == 0
    assert (out / "fine-tuned" / "policy.safetensors").read_bytes() == first
    policies = {name: SimicPolicy.load(out / name).card["extra"]["hosts"] for name in ("fine-tuned", "scratch")}
    assert policies == {"fine-tuned": ["resnet", "transformer"], "scratch": ["transformer"]}
    labels = {run["arm"] for run in summary_of(out / "sweep")}
    assert labels == {"static-1", "onejump", "ppo:zero-shot", "ppo:fine-tuned", "ppo:scratch"}
    report = json.loads((out / "sweep" / "report" / "report.json").read_text())
    [told] = [each for each in report["verdicts"][0]["criteria"] if each["criterion"] == "Transfer"]
    assert "ppo:zero-shot, which has grown resnet: " in told["sentence"]
    assert "to ppo:scratch" in told["sentence"]
