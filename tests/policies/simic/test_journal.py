"""What the journal holds is gone on with: episodes under way and ended ones, and nothing else.

Alone: `pytest tests/policies/simic/test_journal.py`.
"""

import json

import numpy as np
import pytest
from simic_toy import DECISIONS, SPACE, ToyRun
from test_dispatcher import local, make_net

from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import LocalFleet
from esper.policies.simic.journal import EpisodeJournal


def dispatcher(journal: EpisodeJournal | None, **kwargs) -> Dispatcher:
    instances = lambda number: Instance(n_layer=1 + number)  # noqa: E731
    fleet = LocalFleet(local(ToyRun), 3)
    return Dispatcher(fleet, make_net(), SPACE, seed=0, ahead=10_000, instances=instances, journal=journal, **kwargs)


def content(episode):
    return {
        "observations": episode.get_observations(),
        "actions": episode.get_actions(),
        "rewards": episode.get_rewards(),
        "outputs": {key: episode.get_extra_model_outputs(key) for key in episode.extra_model_outputs},
    }


def equal(one, other) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            equal(value, other[key])
        else:
            np.testing.assert_array_equal(value, other[key], err_msg=key)


@pytest.mark.parametrize("turns", [1, 3, 2 * DECISIONS, 3 * DECISIONS + 5])
def test_a_driver_that_dies_anywhere_is_gone_on_with(tmp_path, turns):
    whole = {int(e.id_): content(e) for e in dispatcher(None).collect(9 * DECISIONS)}
    first = dispatcher(EpisodeJournal(tmp_path, SPACE))
    for _ in range(turns):
        first._turn()
    del first  # it dies: nothing is closed
    second = dispatcher(EpisodeJournal(tmp_path, SPACE))
    found = second.collect(9 * DECISIONS)
    assert sorted(int(e.id_) for e in found) == list(range(9))
    for episode in found:
        equal(content(episode), whole[int(episode.id_)])


def test_episodes_go_once_they_are_learned_from(tmp_path):
    journal = EpisodeJournal(tmp_path, SPACE)
    one = dispatcher(journal)
    numbers = [int(episode.id_) for episode in one.collect(4 * DECISIONS)]
    left = one.in_flight()
    one.forget()
    assert sorted(int(path.stem) for path in tmp_path.iterdir()) == left
    again = dispatcher(EpisodeJournal(tmp_path, SPACE), start=one.progress())
    assert again.begun == one.begun
    assert again.in_flight() == left
    later = [int(episode.id_) for episode in again.collect(4 * DECISIONS)]
    assert not set(later) & set(numbers)
    assert set(left) <= {*later, *again.in_flight()}


def test_a_last_line_that_was_not_finished_is_cut_off(tmp_path):
    expected = {int(e.id_): content(e) for e in dispatcher(None).collect(3 * DECISIONS)}
    one = dispatcher(EpisodeJournal(tmp_path, SPACE))
    for _ in range(4):
        one._turn()
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: -1 - int(path.stem) * 200])
    (tmp_path / "000000002.jsonl").write_bytes(b'{"ver')  # not even its first line
    found = {int(e.id_): content(e) for e in dispatcher(EpisodeJournal(tmp_path, SPACE)).collect(3 * DECISIONS)}
    assert found.keys() == expected.keys()
    equal(found, expected)


@pytest.mark.parametrize(
    ("old", "new"), [('"version":2', '"version":9'), ('"observation":"', '"observation":"!!'), ("{", "[")]
)
def test_damage_before_the_last_line_is_told_of(tmp_path, old, new):
    one = dispatcher(EpisodeJournal(tmp_path, SPACE))
    for _ in range(4):
        one._turn()
    path = tmp_path / "000000001.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=r"the episode in .*000000001.jsonl is damaged .*delete that file"):
        dispatcher(EpisodeJournal(tmp_path, SPACE))


def test_a_full_disk_is_told_of_once_and_what_was_written_is_gone_on_with(tmp_path, capfd, files_of_at_most):
    expected = {int(e.id_): content(e) for e in dispatcher(None).collect(6 * DECISIONS)}
    one = dispatcher(EpisodeJournal(tmp_path, SPACE))
    for _ in range(3):
        one._turn()
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    with files_of_at_most(size + 100):
        for _ in range(3):
            one._turn()
    assert capfd.readouterr().err.count("cannot be written") == 1
    for path in tmp_path.iterdir():
        assert all(json.loads(line) for line in path.read_text().splitlines())
    for episode in dispatcher(EpisodeJournal(tmp_path, SPACE)).collect(6 * DECISIONS):
        equal(content(episode), expected[int(episode.id_)])
