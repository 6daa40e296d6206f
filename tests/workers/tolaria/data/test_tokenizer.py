"""Tokenizers: what is encoded comes back, and unusable ones are refused in a sentence."""

import re
import time

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.workers.tolaria.data import tokenizer
from esper.workers.tolaria.data.tokenizer import END, BytePairs

STORIES = [f"Once there were {i} small cats, and {i * i} dogs’ naïve songs.\n\nThe end {i}." for i in range(300)]
BPE = tokenizer.build("bpe:400", STORIES)
TEXTS = st.lists(st.text(max_size=40), min_size=1, max_size=5)


@given(TEXTS)
@settings(deadline=None)
def test_what_is_encoded_comes_back(documents):
    for encoder in (tokenizer.build("char", documents), BPE):
        ids = encoder.encode_documents(documents)
        assert encoder.decode(ids) == "".join(document + END for document in documents)
        assert (ids == encoder.end_id).sum() == len(documents)
        assert ids.max() < encoder.vocab_size
        assert encoder.encode(documents[0]) == ids[: len(encoder.encode(documents[0]))].tolist()
        assert encoder.decode(encoder.encode(documents[0])) == documents[0]


def test_a_spelled_out_end_is_text_and_not_the_end():
    assert (BPE.encode_documents([f"a{END}b"]) == BPE.end_id).sum() == 1


def test_char_ids_are_the_sorted_characters_of_the_training_text():
    encoder = tokenizer.build("char", ["ba", "é"])
    assert encoder.encode_documents(["abé", "z"]).tolist() == [2, 3, 4, 1, 0, 1]
    assert encoder.decode([2, 0, 1]) == f"a\ufffd{END}"


def test_bpe_compresses_and_is_learned_the_same_way_twice():
    assert tokenizer.build("bpe:400", STORIES).fingerprint == BPE.fingerprint
    assert len(BPE.encode_documents(STORIES)) < 0.5 * len("".join(STORIES))


@pytest.mark.parametrize("name", ["char", "bpe:257", "bpe:300"])
def test_saved_and_loaded_is_the_same(name, tmp_path):
    encoder = tokenizer.build(name, STORIES)
    encoder.save(tmp_path)
    loaded = tokenizer.load(name, tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == (name, encoder.vocab_size, encoder.fingerprint)
    np.testing.assert_array_equal(loaded.encode_documents(STORIES), encoder.encode_documents(STORIES))


@pytest.mark.parametrize("change", [lambda s: s[:-9], lambda s: s + s[:9], lambda s: "QQ== 0\n" + s, lambda s: "x"])
def test_damaged_ranks_are_refused(tmp_path, change):
    (tmp_path / BytePairs.FILE).write_text(change(BPE.content))
    with pytest.raises(UserError, match=r"ranks.tiktoken.*cannot be read"):
        tokenizer.load("bpe:400", tmp_path)


@pytest.mark.parametrize("name", ["bpe:256", "bpe:", "bpe:1k", "bpe:-5", "bpe:0300", "bpe:٣٠٠", "bpe:" + "9" * 5000])
def test_bad_sizes_are_refused(name):
    with pytest.raises(UserError, match="at least 257"):
        tokenizer.checked_name(name)


@pytest.mark.parametrize("name", ["chars", "bpe", "bpe:N", "gpt4", ""])
def test_unknown_tokenizers_are_refused_with_the_known(name):
    with pytest.raises(UserError, match="bpe:N, char, gpt2"):
        tokenizer.checked_name(name)


def test_too_little_text_for_the_merges_says_how_many_there_are():
    with pytest.raises(UserError, match=r"ask for bpe:\d+ at most") as error:
        tokenizer.build("bpe:5000", STORIES)
    (most,) = re.findall(r"ask for (bpe:\d+)", str(error.value))
    assert tokenizer.build(most, STORIES).name == most


def refuse(name):
    raise ConnectionError("no route")


@pytest.mark.parametrize("network", [refuse, lambda name: time.sleep(3)])
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
    stand_in = tiktoken.Encoding(
        "gpt2", pat_str=tokenizer.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in)
    tokenizer.build("gpt2", []).save(tmp_path)
    monkeypatch.undo()
    ids = tokenizer.load("gpt2", tmp_path).encode_documents(["the cat"])
    assert ids.tolist() == [*stand_in.encode_ordinary("the cat"), stand_in.eot_token]
