"""`prepare` and `ensure`: whole folders or none, the cache, other tokenizers, the fallback, real text."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from esper.platform.errors import UserError
from esper.workers.tolaria.data import Manifest, TokenData, ensure, prepare, pydocs, shards, sources
from esper.workers.tolaria.data.tokenizer import END

ROOT = Path(__file__).parents[3]
STORIES = [f"Story {i}: " + f"the cat saw {i} dogs. " * 10 for i in range(60)]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(END.join(STORIES))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def python(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def all_text(data: TokenData, split) -> str:
    tokens = data.split(split)
    return data.tokenizer.decode(tokens.windows(np.array([0]), tokens.tokens)[0])


@pytest.mark.parametrize("name", ["char", "bpe:300"])
def test_round_trip(text, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    monkeypatch.setattr("esper.workers.tolaria.data.build.CHUNK_CHARACTERS", 1000)
    manifest = prepare(str(text), name, tmp_path / "out")
    data = TokenData.open(tmp_path / "out")
    assert data.manifest == manifest
    assert (manifest.source, manifest.tokenizer) == (str(text), name)
    documents = {split: all_text(data, split).removesuffix(END).split(END) for split in ("train", "valid")}
    assert sorted(documents["train"] + documents["valid"]) == sorted(story.strip() for story in STORIES)
    for split, counts in manifest.splits.items():
        assert counts.documents == len(documents[split])
        assert counts.characters == counts.bytes == len("".join(documents[split]))
        assert counts.tokens == data.split(split).tokens == sum(shard.tokens for shard in counts.shards)  # type: ignore[arg-type]
        assert counts.unseen == 0
    assert f"{manifest.splits['train'].tokens:,} train tokens" in capsys.readouterr().err


def test_unseen_characters_are_counted(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("abc " * 300)
    (tmp_path / "valid.txt").write_text("abc " * 50 + "žž")
    manifest = prepare(str(tmp_path), "char", tmp_path / "out")
    assert manifest.splits["valid"].unseen == 2
    assert manifest.splits["valid"].bytes == manifest.splits["valid"].characters + 2
    assert manifest.vocab_size == 6
    assert "valid: 2 characters do not occur" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("train", "valid", "words"),
    [
        ("", "abc " * 99, "training text"),
        ("abc " * 99, "abc " * 99, "training"),
        ("abc " * 999, "abc", "validation text"),
    ],
)
def test_too_little_text_is_refused(tmp_path, train, valid, words):
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "valid.txt").write_text(valid)
    with pytest.raises(UserError, match=words):
        prepare(str(tmp_path), "char", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match="has 0 tokens"):
        prepare(str(tmp_path / "a.txt"), "char", tmp_path / "out")


def test_bad_arguments_are_refused(text, tmp_path):
    with pytest.raises(UserError, match="valid_fraction is 1"):
        prepare(str(text), "char", tmp_path / "out", valid_fraction=1)
    with pytest.raises(UserError, match="max_bytes is 0"):
        prepare(str(text), "char", tmp_path / "out", max_bytes=0)
    with pytest.raises(UserError, match="unknown tokenizer"):
        prepare(str(text), "words", tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        prepare(str(text), "char", tmp_path)
    with pytest.raises(UserError, match="already exists"):
        prepare(str(text), "char", text)
    with pytest.raises(UserError, match="cannot be written"):
        prepare(str(text), "char", text / "below")


def test_an_empty_folder_is_filled(text, tmp_path):
    (tmp_path / "out").mkdir()
    manifest = prepare(str(text), "char", tmp_path / "out")
    assert TokenData.open(tmp_path / "out").manifest == manifest


KILLED = """
import os, sys
from pathlib import Path
from esper.workers.tolaria.data import prepare, tokenizer
tokenizer.Characters.save = lambda *_: os._exit(9)  # after the shards, before the manifest
prepare(sys.argv[1], "char", Path(sys.argv[2]))
"""


def test_killed_in_the_middle_leaves_nothing_that_is_used(text, tmp_path):
    out = tmp_path / "here" / "out"
    process = python(KILLED, text, out)
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert list(out.parent.glob(".out.*.partial/train-00000.arrow"))
    assert not out.exists()
    prepare(str(text), "char", out)
    TokenData.open(out)


def test_ensure_prepares_once(text, cache):
    path = ensure(str(text), "char")
    made = (path / "manifest.json").stat().st_mtime_ns
    assert path.parent == cache
    assert ensure(str(text), "char") == path
    assert (path / "manifest.json").stat().st_mtime_ns == made
    TokenData.open(path)


def test_ensure_tells_texts_and_options_apart(text, cache):
    paths = [ensure(str(text), "char"), ensure(str(text), "bpe:300"), ensure(str(text), "char", valid_fraction=0.2)]
    paths.append(ensure(str(text), "char", max_bytes=5000))
    text.write_text(text.read_text() + "More.")
    paths.append(ensure(str(text), "char"))
    assert len(set(paths)) == 5


def test_ensure_returns_prepared_shards_of_this_tokenizer_only(text, tmp_path, cache):
    prepare(str(text), "char", tmp_path / "out")
    assert ensure(str(tmp_path / "out"), "char") == tmp_path / "out"
    with pytest.raises(UserError, match=r"made with tokenizer 'char', and 'bpe:300' was asked for.*esper prepare"):
        ensure(str(tmp_path / "out"), "bpe:300")
    with pytest.raises(UserError, match="prepared shards already"):
        prepare(str(tmp_path / "out"), "char", tmp_path / "again")
    assert not cache.exists()


def test_the_cache_follows_the_environment(text, tmp_path, monkeypatch):
    monkeypatch.delenv("ESPER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ensure(str(text), "char").is_relative_to(tmp_path / "xdg" / "esper")


ENSURE = """
import sys
from esper.workers.tolaria.data import TokenData, ensure
path = ensure(sys.argv[1], sys.argv[2])
TokenData.open(path)
print(path)
"""


def test_several_processes_may_ensure_at_once(text, cache):
    processes = [python(ENSURE, text, "bpe:300") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert {process.returncode for process in processes} == {0}, outputs
    assert {out.strip() for out, _ in outputs} == {str(next(cache.iterdir()))}
    assert len(list(cache.iterdir())) == 1  # the losers' work is gone


def test_offline_tinystories_falls_back_to_python_docs(cache):
    """In a process of its own with no hub: one sentence, in seconds, the same text as made here."""
    started = time.perf_counter()
    process = python(ENSURE, "tinystories", "char", HF_ENDPOINT="http://127.0.0.1:9", PYTHONHASHSEED="7")
    out, err = process.communicate(timeout=60)
    seconds = time.perf_counter() - started
    assert process.returncode == 0, err
    notice, *rest = err.splitlines()
    assert notice == "tinystories needs the Hugging Face hub, which does not answer: using python-docs instead."
    assert len(rest) == 2
    manifest = Manifest.read(Path(out.strip()))
    assert manifest.source == "python-docs"
    assert manifest.splits["train"].bytes > 1_000_000
    assert ensure("python-docs", "char") == Path(out.strip())
    # Reading it here again tells that the text depends on nothing but the Python, and what of the time it took.
    started = time.perf_counter()
    train, _ = sources.split(sources.find("python-docs"), 0.1, None)
    assert sum(len(document.encode()) for document in train) == manifest.splits["train"].bytes
    assert all_text(TokenData.open(Path(out.strip())), "train") == "".join(document + END for document in train)
    assert seconds < 2 * (time.perf_counter() - started) + 10


def test_a_cached_tinystories_is_used_without_the_hub(cache, monkeypatch):
    monkeypatch.setattr(sources.net, "hub_answers", lambda repo: True)
    monkeypatch.setattr(sources.net, "hub_texts", lambda repo, split: iter(STORIES))
    path = ensure("tinystories", "char")
    assert Manifest.read(path).source == "tinystories"
    assert Manifest.read(path).max_bytes == sources.HUB_TRAIN_BYTES
    monkeypatch.setattr(sources.net, "hub_answers", lambda repo: pytest.fail("probed"))
    assert ensure("tinystories", "char") == path


def test_python_docs_are_english_without_surrogates(tmp_path):
    (tmp_path / "odd.py").write_text('class A:\n  """One \\ud800."""\n  def f(self):\n    """Two \\d."""\n')
    (tmp_path / "template.py").write_text("def {name}")
    assert list(pydocs._documents(tmp_path / "odd.py", "odd")) == ["odd.A\nOne ?.\n\nodd.A.f\nTwo \\d."]
    assert list(pydocs._documents(tmp_path / "template.py", "template")) == []


@pytest.mark.parametrize(
    ("name", "max_bytes", "documents", "tokens"),
    [("char", None, 13_250, 10_830_856), ("bpe:1024", 2_000_000, 2_434, 636_506)],
)
def test_tinystories_slice(tinystories, tmp_path, name, max_bytes, documents, tokens):
    manifest = prepare(str(tinystories), name, tmp_path / "out", max_bytes=max_bytes)
    train, valid = manifest.splits["train"], manifest.splits["valid"]
    assert (train.documents, train.tokens) == (documents, tokens)
    assert (valid.documents, valid.unseen) == (2_467, 0)
    assert TokenData.open(tmp_path / "out").split("train").tokens == tokens
