"""Shards: windows over boundaries, zero-copy maps, and damage that is refused."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.workers.tolaria.data import Manifest, TokenData, TokenSplit, prepare, shards
from esper.workers.tolaria.data.manifest import FILE

TEXT = "\n<|endoftext|>\n".join(f"Story {i}: " + f"the cat saw {i} dogs. " * 10 for i in range(60))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "stories.txt").write_text(TEXT)
    prepare(str(folder / "stories.txt"), "char", folder / "whole")
    return folder / "whole"


@pytest.fixture
def prepared(whole, tmp_path, monkeypatch):
    """The same text in shards of 1,000 bytes, for each test to damage."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    prepare(str(whole.parent / "stories.txt"), "char", tmp_path / "out")
    return tmp_path / "out"


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_windows_equal_slices_of_the_whole(lengths, data):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    split = TokenSplit(np.split(whole, np.cumsum(lengths)[:-1]))
    assert split.tokens == len(whole)
    length = data.draw(st.integers(1, len(whole)))
    starts = data.draw(st.lists(st.integers(0, len(whole) - length), max_size=5))
    windows = split.windows(np.array(starts, dtype=np.int64), length)
    assert windows.dtype == np.int64
    assert windows.shape == (len(starts), length)
    assert windows.tolist() == [whole[start : start + length].tolist() for start in starts]


@pytest.mark.parametrize("starts", [[-1], [0, 6]])
@pytest.mark.parametrize("arrays", [[np.arange(10)], [np.arange(4), np.arange(6)]])
def test_windows_outside_are_refused(starts, arrays):
    with pytest.raises(IndexError):
        TokenSplit(arrays).windows(np.array(starts), 5)


def test_one_shard_and_many_hold_the_same_tokens(whole, prepared):
    one, many = TokenData.open(whole), TokenData.open(prepared)
    assert len(one.manifest.splits["train"].shards) == 1
    assert len(many.manifest.splits["train"].shards) > 10
    assert max(shard.tokens for shard in many.manifest.splits["train"].shards) == 500
    starts = np.arange(0, one.split("train").tokens - 700, 97)
    expected = one.split("train").windows(starts, 700)
    np.testing.assert_array_equal(many.split("train").windows(starts, 700), expected)


def test_the_map_is_not_a_copy(whole):
    before = pa.total_allocated_bytes()
    data = TokenData.open(whole)
    (array,) = data.split("train")._arrays
    assert pa.total_allocated_bytes() - before < array.nbytes
    assert array.dtype == np.uint16
    assert not array.flags.writeable
    assert not array.flags.owndata


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    ids = np.array([0, vocab_size - 1])
    (shard,) = shards.write_split(tmp_path, "train", [ids], vocab_size)
    stored = shards._map(tmp_path / shard.file, shard)
    assert stored.dtype == dtype
    assert stored.tolist() == ids.tolist()


def test_the_tokenizer_comes_with_the_shards(whole):
    data = TokenData.open(whole)
    text = data.tokenizer.decode(data.split("valid").windows(np.array([0]), 6)[0])
    assert text == "Story "


def test_data_pickles_as_its_path(whole):
    data = TokenData.open(whole)
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).manifest == data.manifest


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "corrupt": flip,
    "short": shorten,
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["train-00003.arrow", "valid-00000.arrow"])
def test_damaged_shards_are_refused(prepared, file, damage):
    DAMAGE[damage](prepared / file)
    with pytest.raises(UserError, match=f"{file} is .*esper prepare"):
        TokenData.open(prepared)
    if damage != "corrupt":  # which only the checksum sees
        with pytest.raises(UserError, match=file):
            TokenData.open(prepared, verify=False)


def test_shards_in_each_others_place_are_refused(prepared):
    (prepared / "train-00000.arrow").rename(prepared / "x")
    (prepared / "train-00001.arrow").rename(prepared / "train-00000.arrow")
    (prepared / "x").rename(prepared / "train-00001.arrow")
    with pytest.raises(UserError, match=r"train-00000.arrow is corrupt"):
        TokenData.open(prepared)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": 99}, "version 99"), ({"version": None}, "version None"), ({"vocab_size": "many"}, "vocab_size")],
)
def test_other_manifests_are_refused(prepared, change, words):
    values = json.loads((prepared / FILE).read_text())
    (prepared / FILE).write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=words):
        TokenData.open(prepared)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1', "null"])
def test_damaged_manifests_are_refused(prepared, content):
    (prepared / FILE).write_text(content)
    with pytest.raises(UserError, match=f"{FILE}.*esper prepare"):
        Manifest.read(prepared)


def test_no_shards_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="no folder of prepared shards"):
            TokenData.open(path)


@pytest.mark.parametrize("content", ['"abc"', "7", "", None])
def test_a_wrong_tokenizer_file_is_refused(prepared, content):
    path = prepared / "characters.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"characters.json.*esper prepare"):
        TokenData.open(prepared).tokenizer  # noqa: B018
