"""Prepared text: windows, a map that is no copy, and damage that is refused, always in a sentence."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest

from esper.platform.errors import UserError
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.data.prepared import FILE


@pytest.fixture
def prepared(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "out")


def test_the_map_is_not_a_copy_and_pickles_as_its_path(shards):
    before = pa.total_allocated_bytes()
    data = TokenData.open(shards)
    array = data.arrays["train"]
    assert pa.total_allocated_bytes() - before < array.nbytes
    assert array.dtype == np.uint16
    assert not array.flags.writeable
    assert not array.flags.owndata
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).manifest == data.manifest


def sign(path, *columns):
    """Replace a split's content, and give the manifest its checksum."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("tokens", columns[0].type)])) as writer:
        for column in columns:
            writer.write_batch(pa.record_batch([column], names=["tokens"]))
    split = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tokens": 500}
    rewrite(path.parent, lambda m: m["splits"]["train"].update(split))


def rewrite(folder, change):
    values = json.loads((folder / FILE).read_text())
    change(values)
    (folder / FILE).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "verified"),
    [
        (lambda path: path.unlink(), False),
        (lambda path: shutil.copy(path.with_name("valid.arrow"), path), False),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"\5", b"\6")), True),  # seen by the checksum alone
        (lambda path: sign(path, pa.array(np.zeros(500))), False),
        (lambda path: sign(path, pa.array([None] * 500, pa.uint16())), False),
        (lambda path: sign(path, pa.array(np.full(500, 300, np.uint16))), True),  # not the tokenizer's
        (lambda path: sign(path, *(pa.array(np.zeros(n, np.uint16)) for n in (100, 400))), False),
    ],
)
def test_damaged_ids_are_refused(prepared, damage, verified):
    damage(prepared / "train.arrow")
    for verify in {True, verified}:
        with pytest.raises(UserError, match=f"{prepared}.* cannot be used .*esper prepare"):
            TokenData.open(prepared, verify=verify)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(version=99), "version is 99"),
        (lambda m: m.update(vocab_size=5), "not the tokenizer that made"),
        (lambda m: m.update(vocab_size=10**12), "vocab_size is 1000000000000"),
        (lambda m: m.update(tokenizer="bpe:300"), "ranks.tiktoken"),
        (lambda m: m["splits"].pop("valid"), "splits"),
        (lambda m: m["splits"].update({"../a": m["splits"]["train"]}), "splits"),
    ],
)
def test_other_manifests_are_refused(prepared, change, words):
    rewrite(prepared, change)
    with pytest.raises(UserError, match=words):
        TokenData.open(prepared)


@pytest.mark.parametrize("name", [FILE, "characters.json"])
@pytest.mark.parametrize("content", [None, b"", b'"ba"', b"\xff", b"[" * 100_000])
def test_a_damaged_manifest_or_tokenizer_is_refused(prepared, name, content):
    (prepared / name).unlink() if content is None else (prepared / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.* cannot be (used|read) .*: make (its|the) folder anew"):
        TokenData.open(prepared)
