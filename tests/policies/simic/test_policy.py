"""SimicPolicy: choices, files, and one sentence for every way in which a path is not a policy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from simic_toy import ToyRun

from esper.platform.errors import UserError
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import CARD, SimicPolicy, likeliest


@pytest.fixture
def policy() -> SimicPolicy:
    torch.manual_seed(0)
    net = ControllerNet(16)
    with torch.no_grad():
        net.score[-1].weight.normal_()
    return SimicPolicy(net)


def test_greedy_takes_the_likeliest_legal_row(policy: SimicPolicy):
    telemetry = ToyRun().reset(None, 3)
    action = policy.act(telemetry)
    assert action == policy.act(telemetry)
    assert telemetry.mask[action.index]
    assert action.sequence == telemetry.sequence
    assert action.reason


def test_acting_competes_with_waiting_as_a_whole():
    assert likeliest(np.array([0.4, 0.1, 0.3, 0.2])) == 2
    assert likeliest(np.array([0.6, 0.1, 0.3, 0.0])) == 0


def test_sampling_needs_a_generator_and_repeats_with_it(policy: SimicPolicy):
    with pytest.raises(ValueError, match="rng"):
        SimicPolicy(policy.net, sample=True)
    telemetry = ToyRun().reset(None, 3)
    drawn = [
        [SimicPolicy(policy.net, sample=True, rng=rng).act(telemetry).index for _ in range(50)]
        for rng in (np.random.default_rng(1), np.random.default_rng(1))
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1
    assert all(telemetry.mask[i] for i in drawn[0])


def test_save_and_load(policy: SimicPolicy, tmp_path: Path):
    folder = tmp_path / "run" / "policy"
    policy.save(folder, {"preset": "demo"})
    telemetry = ToyRun().reset(None, 3)
    for path in (folder, tmp_path / "run"):
        loaded = SimicPolicy.load(path)
        assert loaded.act(telemetry) == policy.act(telemetry)
        assert loaded.card["extra"] == {"preset": "demo"}


def test_saving_again_replaces(policy: SimicPolicy, tmp_path: Path):
    policy.save(tmp_path)
    with torch.no_grad():
        next(policy.net.parameters()).add_(1.0)
    policy.save(tmp_path)
    policy.save(tmp_path)
    loaded = SimicPolicy.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.net.parameters(), policy.net.parameters(), strict=True))
    assert len(list(tmp_path.iterdir())) == 2


def test_loads_without_ray(policy: SimicPolicy, tmp_path: Path):
    policy.save(tmp_path)
    code = (
        "import sys; from pathlib import Path; from esper.policies.simic.policy import SimicPolicy\n"
        f"SimicPolicy.load(Path({str(tmp_path)!r})); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _no_weights(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def _flipped_bit(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _card(**changes: object):
    def change(folder: Path) -> None:
        path = folder / CARD
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_no_weights, "damaged"),
        (_flipped_bit, "damaged"),
        (lambda folder: (folder / CARD).write_text("{"), "damaged"),
        (lambda folder: (folder / CARD).write_text("[]"), "damaged"),
        (_card(hidden="wide"), "damaged"),
        (_card(weights="../secret"), "damaged"),
        (_card(hidden=17), "another network"),
        (_card(telemetry_version=0), "telemetry version 0"),
        (_card(format="simic-0"), "format 'simic-0'"),
        (lambda folder: (folder / CARD).unlink(), "holds no trained policy"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_sentence(policy: SimicPolicy, tmp_path: Path, damage, says: str):
    policy.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        SimicPolicy.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_path(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        SimicPolicy.load(tmp_path / "nowhere")
