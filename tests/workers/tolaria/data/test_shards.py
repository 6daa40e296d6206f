"""Shards: windows over boundaries, zero-copy maps, and damage that is refused, always in a sentence."""

import contextlib
import hashlib
import json
import pickle
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.platform.spec import DataSpec
from esper.workers.tolaria.data import Manifest, TokenData, TokenSplit, prepare, shards
from esper.workers.tolaria.data.shards import FILE

TEXT = "\n<|endoftext|>\n".join(f"Story {i}: " + f"the cat saw {i} dogs. " * 10 for i in range(60))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(text):
    prepare(DataSpec(source=str(text)), text.parent / "whole")
    return text.parent / "whole"


@pytest.fixture(scope="module")
def many(text):
    """The same text in shards of 1,000 bytes."""
    size, shards.SHARD_BYTES = shards.SHARD_BYTES, 1000
    prepare(DataSpec(source=str(text)), text.parent / "many")
    shards.SHARD_BYTES = size
    return text.parent / "many"


@pytest.fixture
def prepared(many, tmp_path):
    """A copy for a test to damage."""
    return shutil.copytree(many, tmp_path / "out")


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_windows_equal_slices_of_the_whole(lengths, data):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    split = TokenSplit(np.split(whole, np.cumsum(lengths)[:-1]))
    assert split.tokens == len(whole)
    length = data.draw(st.integers(1, len(whole)))
    starts = data.draw(st.lists(st.integers(0, len(whole) - length), max_size=5))
    windows = split.windows(np.array(starts, dtype=np.int64), length)
    assert windows.dtype == np.int64
    assert windows.tolist() == [whole[start : start + length].tolist() for start in starts]


@pytest.mark.parametrize("starts", [[-1], [0, 6]])
@pytest.mark.parametrize("arrays", [[np.arange(10)], [np.arange(4), np.arange(6)]])
def test_windows_outside_are_refused(starts, arrays):
    with pytest.raises(IndexError):
        TokenSplit(arrays).windows(np.array(starts), 5)


def test_one_shard_and_many_hold_the_same_tokens(whole, many):
    one, other = TokenData.open(whole), TokenData.open(many)
    assert len(one.manifest.splits["train"].shards) == 1
    assert max(shard.tokens for shard in other.manifest.splits["train"].shards) == 500
    starts = np.arange(0, one.split("train").tokens - 700, 97)
    expected = one.split("train").windows(starts, 700)
    np.testing.assert_array_equal(other.split("train").windows(starts, 700), expected)
    assert one.tokenizer.decode(one.split("valid").windows(np.array([0]), 6)[0]) == "Story "


def test_the_map_is_not_a_copy_and_pickles_as_its_path(whole):
    before = pa.total_allocated_bytes()
    data = TokenData.open(whole)
    (array,) = data.split("train").arrays
    assert pa.total_allocated_bytes() - before < array.nbytes
    assert array.dtype == np.uint16
    assert not array.flags.writeable
    assert not array.flags.owndata
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).manifest == data.manifest


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sign(path, *columns):
    """Replace a shard's content, and give the manifest its checksum."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("tokens", columns[0].type)])) as writer:
        for column in columns:
            writer.write_batch(pa.record_batch([column], names=["tokens"]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(path.parent, lambda m: m["splits"]["train"]["shards"][3].update(sha256=digest))


def rewrite(folder, change):
    values = json.loads((folder / FILE).read_text())
    change(values)
    (folder / FILE).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (lambda path: path.unlink(), False),
        (flip, True),  # which only the checksum sees
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), False),
        (lambda path: path.write_bytes(b""), False),
        (lambda path: shutil.copy(path.with_name("train-00001.arrow"), path), True),
        (lambda path: sign(path, pa.array(np.zeros(500))), False),
        (lambda path: sign(path, pa.array(["a"] * 500)), False),
        (lambda path: sign(path, pa.array([None] * 500, pa.uint16())), False),
        (lambda path: sign(path, pa.array(np.full(500, 300, np.uint16))), True),  # not the tokenizer's
        (lambda path: sign(path, *(pa.array(np.zeros(n, np.uint16)) for n in (100, 400))), False),
    ],
)
def test_damaged_shards_are_refused(prepared, damage, seen):
    damage(prepared / "train-00003.arrow")
    for verify in (True,) if seen else (True, False):
        with pytest.raises(UserError, match=f"{prepared}.* cannot be used .*esper prepare"):
            TokenData.open(prepared, verify=verify)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(version=99), "version is 99"),
        (lambda m: m.update(vocab_size=5), "not the tokenizer that made"),
        (lambda m: m.update(vocab_size=10**12), "vocab_size is 1000000000000"),
        (lambda m: m.update(tokenizer="words"), "unknown tokenizer"),
        (lambda m: m.update(tokenizer="bpe:300"), "ranks.tiktoken"),
        (lambda m: m["splits"].pop("valid"), "splits"),
        (lambda m: m["splits"]["train"].update(shards=[]), "shards"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../a.arrow"), "file"),
        (lambda m: m["splits"]["train"]["shards"][0].update(sha256="0"), "sha256"),
    ],
)
def test_other_manifests_are_refused(prepared, change, words):
    rewrite(prepared, change)
    with pytest.raises(UserError, match=words):
        TokenData.open(prepared)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1', b"\xff", b"[" * 100_000, b"9" * 9999])
def test_damaged_manifests_are_refused(prepared, content):
    (prepared / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{FILE}.*esper prepare"):
        Manifest.read(prepared)


@pytest.mark.parametrize("content", ['"ba"', "7", "", None, "[" * 100_000])
def test_a_wrong_tokenizer_file_is_refused(prepared, content):
    path = prepared / "characters.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"characters.json"):
        TokenData.open(prepared)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), verify=st.booleans())
def test_any_mutated_file_is_whole_or_refused_in_a_sentence(many, tmp_path_factory, seed, verify):
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("mutated") / "out"
    shutil.copytree(many, folder)
    file = folder / chance.choice([FILE, "characters.json", "train-00003.arrow"])
    content = bytearray(file.read_bytes())
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content))
        content[at : at + chance.choice([0, 1, 1, 9])] = chance.randbytes(chance.choice([0, 1, 1, 5]))
    file.write_bytes(content)
    with contextlib.suppress(UserError):
        data = TokenData.open(folder, verify=verify)
        assert data.split("train").tokens > 1000
        assert data.tokenizer.encode("cat")


def test_no_shards_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="no folder of prepared shards"):
            TokenData.open(path)
