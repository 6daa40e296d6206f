"""SimicPolicy: choices, its file, and one sentence for every way in which a path is not a policy."""

import contextlib
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
from esper.policies.simic.policy import FILE, SimicPolicy, likeliest, trained_on
from tests.pipelines.helpers import made_net

TELEMETRY = ToyRun().reset(None, 3)


@pytest.fixture(scope="module")
def policy() -> SimicPolicy:
    return SimicPolicy(made_net())


def test_acting_competes_with_waiting_as_a_whole(policy: SimicPolicy):
    assert likeliest(np.array([0.4, 0.1, 0.3, 0.2])) == 2
    assert likeliest(np.array([0.6, 0.1, 0.3, 0.0])) == 0
    action = policy.act(TELEMETRY)
    assert action == policy.act(TELEMETRY)
    assert TELEMETRY.mask[action.index]
    assert action.reason


def test_save_and_load_whatever_is_named(policy: SimicPolicy, tmp_path: Path):
    for number in ("000001", "000002"):
        file = tmp_path / "checkpoints" / number / FILE
        SimicPolicy(ControllerNet(16)).save(file)
    policy.save(file, {"preset": "demo"})  # over the earlier one
    for path in (file, file.parent, tmp_path):
        loaded = SimicPolicy.load(path)
        assert loaded.act(TELEMETRY) == policy.act(TELEMETRY)
        assert loaded.card["extra"] == {"preset": "demo"}


@pytest.mark.parametrize(
    ("card", "tensors", "says"),
    [
        ({"format": "simic-2"}, {}, "format 'simic-2'"),
        ({"telemetry_version": 0}, {}, "telemetry version 0"),
        ({"hidden": 17}, {}, "another network"),
        ({"hidden": 10**9}, {}, "less than or equal to 4096"),
        ({"hidden": True}, {}, "hidden is True"),
        ({"more": 1}, {}, "unknown key"),
        *(({"extra": {"hosts": odd}}, {}, "as the hosts that it has grown") for odd in (3, "resnet", [1])),
        ({}, {"score.2.weight": torch.full((1, 16), torch.nan)}, "finite"),
        ({}, {"score.2.weight": torch.zeros(1, 16, dtype=torch.float64)}, "float32"),
        ({}, {"more": torch.zeros(1)}, "another network"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_sentence(policy: SimicPolicy, tmp_path: Path, card, tensors, says: str):
    """Files whose checksum fits: only their meaning is wrong."""
    checkpoint.write(tmp_path / FILE, policy.card | card, policy.net.state_dict() | tensors)
    with pytest.raises(UserError, match=says) as caught:
        trained_on(SimicPolicy.load(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / FILE).unlink()
    for path, says in ((tmp_path, "holds no trained policy"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(UserError, match=says):
            SimicPolicy.load(path)


LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(st.text(), LEAF, max_size=3)


@given(data=st.data())
def test_whatever_a_file_means_it_loads_or_is_refused_in_a_sentence(tmp_path_factory, policy: SimicPolicy, data):
    """Its checksum fits; `tests/platform/test_checkpoint.py` has damaged bytes."""
    file = tmp_path_factory.mktemp("fuzz") / FILE
    key = data.draw(st.sampled_from([*policy.card, "else"]))
    card = policy.card | {key: data.draw(JSON)} if data.draw(st.booleans()) else data.draw(JSON)
    name = data.draw(st.sampled_from([*policy.net.state_dict(), "else"]))
    shape = data.draw(st.lists(st.integers(0, 17), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]))
    checkpoint.write(file, card, policy.net.state_dict() | {name: torch.ones(shape).to(dtype)})
    with contextlib.suppress(UserError):
        assert SimicPolicy.load(file).act(TELEMETRY).index in TELEMETRY.legal()
