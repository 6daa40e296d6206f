"""Saves in a folder and on a pyarrow filesystem: the newest whole one comes back, and nothing else does.

Alone: `pytest tests/platform/test_saves.py`.
"""

import pytest
import torch

from esper.platform.checkpoint import MANIFEST, TENSORS
from esper.platform.errors import UserError
from esper.platform.saves import Saves


@pytest.fixture(params=["path", "uri"])
def place(request, tmp_path) -> str:
    """A folder as such, and as a filesystem that pyarrow reads and writes."""
    folder = tmp_path / "saves"
    return str(folder) if request.param == "path" else folder.as_uri()


def save(saves: Saves, episode: int, number: int) -> None:
    saves.save(episode, number, {"number": number}, {"w": torch.full((1000,), float(number))})
    saves.flush()


def test_the_newest_comes_back_in_another_process_s_hands(place, tmp_path):
    saves = Saves(place)
    for number in range(3):
        save(saves, 7, number)
    save(saves, 8, 5)
    assert saves.failed is None
    for number, episode in ((2, 7), (5, 8)):
        found = Saves(place).load(episode)
        assert found is not None
        assert found[0] == {"number": number}
        assert torch.equal(found[1]["w"], torch.full((1000,), float(number)))
    folders = {path.name: [p.name for p in path.iterdir()] for path in (tmp_path / "saves").iterdir()}
    assert folders == {"episode-000000007": ["number-000000002"], "episode-000000008": ["number-000000005"]}


def test_only_those_that_are_to_be_kept_stay(place):
    saves = Saves(place)
    for episode in (1, 2, 12):
        save(saves, episode, 0)
    saves.keep_only([2])
    assert [episode for episode in (1, 2, 12) if Saves(place).load(episode) is not None] == [2]


def test_nothing_there_is_nothing(place):
    assert Saves(place).load(1) is None
    Saves(place).drop(1)


@pytest.mark.parametrize("file", [TENSORS, MANIFEST])
def test_a_torn_save_is_not_there(place, tmp_path, file):
    save(Saves(place), 1, 4)
    path = tmp_path / "saves" / "episode-000000001" / "number-000000004" / file
    path.write_bytes(path.read_bytes()[:-10])
    assert Saves(place).load(1) is None
    path.unlink()
    assert Saves(place).load(1) is None


def test_dropped_and_saved_again_from_the_start(place):
    saves = Saves(place)
    save(saves, 1, 4)
    saves.drop(1)
    assert saves.load(1) is None
    save(saves, 1, 0)
    found = Saves(place).load(1)
    assert found is not None
    assert found[0] == {"number": 0}


def test_a_place_that_cannot_be_written_to_is_told_of(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), (tmp_path / "file").as_uri()):
        saves = Saves(place)
        save(saves, 1, 0)
        assert saves.failed is not None
        assert "was not written" in saves.failed
        assert saves.load(1) is None
    assert "mend that" in capfd.readouterr().err


@pytest.mark.parametrize("place", ["nonsense://there", "://"])
def test_an_unknown_kind_of_place(place):
    with pytest.raises(UserError, match=r"fleet\.storage is .* which cannot be used"):
        Saves(place)
