"""SimicPolicy: choices, its file, and one sentence for every way in which a path is not a policy."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simic_toy import ToyRun

from esper.platform import checkpoint
from esper.platform.errors import UserError
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import FILE, SimicPolicy, likeliest

TELEMETRY = ToyRun().reset(None, 3)


@pytest.fixture(scope="module")
def policy() -> SimicPolicy:
    torch.manual_seed(0)
    net = ControllerNet(16)
    with torch.no_grad():
        net.score[-1].weight.normal_()
    return SimicPolicy(net)


def test_acting_competes_with_waiting_as_a_whole(policy: SimicPolicy):
    assert likeliest(np.array([0.4, 0.1, 0.3, 0.2])) == 2
    assert likeliest(np.array([0.6, 0.1, 0.3, 0.0])) == 0
    action = policy.act(TELEMETRY)
    assert action == policy.act(TELEMETRY)
    assert TELEMETRY.mask[action.index]
    assert (action.sequence, bool(action.reason)) == (TELEMETRY.sequence, True)


def test_save_and_load_whatever_is_named_without_ray(policy: SimicPolicy, tmp_path: Path):
    file = tmp_path / "checkpoints" / "000002" / FILE
    for run in (tmp_path / "checkpoints" / "000001" / FILE, file):
        SimicPolicy(ControllerNet(16)).save(run)
    policy.save(file, {"preset": "demo"})  # over the earlier one
    for path in (file, file.parent, tmp_path):
        loaded = SimicPolicy.load(path)
        assert loaded.act(TELEMETRY) == policy.act(TELEMETRY)
        assert loaded.card["extra"] == {"preset": "demo"}
    code = (
        "import sys; from pathlib import Path; from esper.policies.simic.policy import SimicPolicy\n"
        f"SimicPolicy.load(Path({str(tmp_path)!r})); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("card", "tensors", "says"),
    [
        ({"format": "simic-2"}, {}, "format 'simic-2'"),
        ({"telemetry_version": 0}, {}, "telemetry version 0"),
        ({"hidden": 17}, {}, "another network"),
        ({"hidden": 10**9}, {}, "less than or equal to 4096"),
        ({"hidden": True}, {}, "hidden is True"),
        ({"more": 1}, {}, "unknown key"),
        ({}, {"score.2.weight": torch.full((1, 16), torch.nan)}, "finite"),
        ({}, {"score.2.weight": torch.zeros(1, 16, dtype=torch.float64)}, "float32"),
        ({}, {"more": torch.zeros(1)}, "another network"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_sentence(policy: SimicPolicy, tmp_path: Path, card, tensors, says: str):
    """Files whose checksum fits: only their meaning is wrong."""
    checkpoint.write(tmp_path / FILE, policy.card | card, policy.net.state_dict() | tensors)
    with pytest.raises(UserError, match=says) as caught:
        SimicPolicy.load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / FILE).unlink()
    for path, says in ((tmp_path, "holds no trained policy"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(UserError, match=says):
            SimicPolicy.load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_whatever_a_file_holds_it_loads_or_is_refused_in_a_sentence(
    tmp_path_factory, policy: SimicPolicy, data: st.DataObject
):
    file = tmp_path_factory.mktemp("fuzz") / FILE
    if data.draw(st.booleans()):  # bytes changed, cut or added
        policy.save(file)
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    else:  # another meaning, with a checksum that fits
        key = data.draw(st.sampled_from([*policy.card, "else"]))
        card = policy.card | {key: data.draw(JSON)} if data.draw(st.booleans()) else data.draw(JSON)
        name = data.draw(st.sampled_from([*policy.net.state_dict(), "else"]))
        shape = data.draw(st.lists(st.integers(0, 17), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]))
        checkpoint.write(file, card, policy.net.state_dict() | {name: torch.ones(shape).to(dtype)})
    with contextlib.suppress(UserError):
        assert SimicPolicy.load(file).act(TELEMETRY).index in TELEMETRY.legal()
