"""Tokenizers: what is encoded comes back, and unusable ones are refused in a sentence."""

import re
import time
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.workers.tolaria.data import tokenizer
from esper.workers.tolaria.data.tokenizer import END, BytePairs

STORIES = [f"Once there were {i} small cats, and {i * i} dogs’ naïve songs.\n\nThe end {i}." for i in range(300)]
BPE = tokenizer.build("bpe:400", STORIES)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_what_is_encoded_comes_back(documents):
    for encoder in (tokenizer.build("char", documents), BPE):
        ids = encoder.encode_documents(documents)
        assert encoder.decode(ids) == "".join(document + END for document in documents)
        assert (ids == encoder.end_id).sum() == len(documents)
        assert ids.max() < encoder.vocab_size
        assert encoder.encode(documents[0]) == ids[: len(encoder.encode(documents[0]))].tolist()


def test_ids_are_sorted_characters_or_learned_pairs_and_a_spelled_out_end_is_text():
    encoder = tokenizer.build("char", ["ba", "é"])
    assert encoder.encode_documents(["abé", "z"]).tolist() == [2, 3, 4, 1, 0, 1]
    assert encoder.decode([2, 0, 1]) == f"a\ufffd{END}"
    assert len(BPE.encode_documents(STORIES)) < 0.5 * len("".join(STORIES))
    assert (BPE.encode_documents([f"a{END}b"]) == BPE.end_id).sum() == 1


@pytest.mark.parametrize("name", ["char", "bpe:257", "bpe:400"])
def test_built_again_or_saved_and_loaded_it_is_the_same(name, tmp_path):
    encoder = tokenizer.build(name, STORIES)
    encoder.save(tmp_path)
    for other in (tokenizer.build(name, STORIES), tokenizer.load(name, tmp_path)):
        assert (other.name, other.vocab_size, other.fingerprint) == (name, encoder.vocab_size, encoder.fingerprint)
        np.testing.assert_array_equal(other.encode_documents(STORIES), encoder.encode_documents(STORIES))


@pytest.mark.parametrize("change", [lambda s: s[:-9], lambda s: s + s[:9], lambda s: "QQ== 0\n" + s, lambda s: "x"])
def test_damaged_ranks_are_refused(tmp_path, change):
    (tmp_path / BytePairs.FILE).write_text(change(BPE.content))
    with pytest.raises(UserError, match=r"ranks.tiktoken.*cannot be read"):
        tokenizer.load("bpe:400", tmp_path)


@pytest.mark.parametrize("name", ["bpe:256", "bpe:", "bpe:-5", "bpe:0300", "bpe:٣٠٠", "bpe:" + "9" * 5000, "gpt4", ""])
def test_unknown_tokenizers_are_refused_with_the_known(name):
    with pytest.raises(UserError, match=r"unknown tokenizer .* char, gpt2 or bpe:N.* at least 257"):
        tokenizer.checked_name(name)


def test_too_little_text_for_the_merges_says_how_many_there_are():
    with pytest.raises(UserError, match=r"ask for bpe:\d+ at most") as error:
        tokenizer.build("bpe:5000", STORIES)
    (most,) = re.findall(r"ask for (bpe:\d+)", str(error.value))
    assert tokenizer.build(most, STORIES).name == most


@pytest.mark.parametrize("network", [Mock(side_effect=ConnectionError("no route")), lambda name: time.sleep(3)])
def test_gpt2_is_refused_in_a_sentence_and_soon_when_it_cannot_be_fetched(monkeypatch, network):
    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.2)
    monkeypatch.setattr(tiktoken, "get_encoding", network)
    started = time.perf_counter()
    with pytest.raises(UserError, match="use char or bpe:N"):
        tokenizer.build("gpt2", [])
    assert time.perf_counter() - started < 2


def test_gpt2_keeps_its_ids_and_is_saved_for_offline_use(monkeypatch, tmp_path):
    """With a stand-in for the download: the vocabulary itself is not on every machine."""
    ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in reversed(range(256))), b"th", b"the"])}
    pattern, special = tokenizer.GPT2_PATTERN, {END: len(ranks)}
    stand_in = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in)
    tokenizer.build("gpt2", []).save(tmp_path)
    monkeypatch.undo()
    ids = tokenizer.load("gpt2", tmp_path).encode_documents(["the cat"])
    assert ids.tolist() == [*stand_in.encode_ordinary("the cat"), stand_in.eot_token]
