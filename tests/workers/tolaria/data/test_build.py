"""`prepare` and `ensure`: whole folders or none, the cache, the fallback, real text."""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from esper.platform.data_spec import DataSpec
from esper.platform.errors import UserError
from esper.workers.tolaria.data import TokenData, ensure, prepare, sources
from esper.workers.tolaria.data.tokenizer import END

ROOT = Path(__file__).parents[4]
STORIES = [f"Story {i}: " + f"the cat saw {i} dogs. " * 10 for i in range(60)]


def data_spec(source: object, tokenizer: str = "char", **options) -> DataSpec:
    return DataSpec(source=str(source), tokenizer=tokenizer, **options)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(END.join(STORIES))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.mark.parametrize("name", ["char", "bpe:300"])
def test_round_trip(text, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr("esper.workers.tolaria.data.build.CHUNK_DOCUMENTS", 7)
    (tmp_path / "out").mkdir()  # an empty folder is filled
    manifest = prepare(data_spec(text, name), tmp_path / "out")
    data = TokenData.open(tmp_path / "out")
    assert data.manifest == manifest
    assert (manifest.source, manifest.tokenizer) == (str(text), name)
    documents = {split: data.tokenizer.decode(ids).removesuffix(END).split(END) for split, ids in data.arrays.items()}
    assert sorted(documents["train"] + documents["valid"]) == sorted(story.strip() for story in STORIES)
    for split, counts in manifest.splits.items():
        characters = len("".join(documents[split]))
        expected = (len(documents[split]), len(data.arrays[split]), characters, characters, 0)
        assert (counts.documents, counts.tokens, counts.characters, counts.bytes, counts.unseen) == expected
    assert f"{manifest.splits['train'].tokens:,} train tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_one_line_is_a_text(tmp_path, name):
    line = "once upon a time there was a cat. " * 2800
    (tmp_path / name).write_text(f'{{"text": "{line}"}}' if name.endswith("jsonl") else line)
    manifest = prepare(data_spec(tmp_path / name), tmp_path / "out")
    counts = [manifest.splits[split].characters for split in ("train", "valid")]
    assert counts == pytest.approx([0.9 * len(line), 0.1 * len(line)], rel=0.01)


def test_what_fails_in_the_middle_leaves_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr("esper.workers.tolaria.data.tokenizer.Characters.save", lambda *_: 1 / 0)  # after the ids
    with pytest.raises(ZeroDivisionError):
        prepare(data_spec(text), tmp_path / "here" / "out")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("train", "valid", "words"),
    [
        ("", "abc " * 99, "train text has 0 tokens"),
        ("abc " * 99, "abc " * 99, "train text"),
        ("abc " * 999, "abc", "valid text"),
    ],
)
def test_too_little_text_is_refused_and_unseen_characters_are_counted(tmp_path, train, valid, words):
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "valid.txt").write_text(valid)
    with pytest.raises(UserError, match=words):
        prepare(data_spec(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "train.txt").write_text("abc " * 300)
    (tmp_path / "valid.txt").write_text("abc " * 50 + "žž")
    counts = prepare(data_spec(tmp_path), tmp_path / "out").splits["valid"]
    assert (counts.unseen, counts.bytes) == (2, counts.characters + 2)


def test_ensure_prepares_once_and_tells_texts_and_options_apart(text, cache):
    path = ensure(data_spec(text))
    made = (path / "manifest.json").stat().st_mtime_ns
    assert path.parent == cache
    assert ensure(data_spec(text)) == path
    assert (path / "manifest.json").stat().st_mtime_ns == made
    options = {"tokenizer": "bpe:300"}, {"valid_fraction": 0.2}, {"max_bytes": 5000}
    others = [ensure(data_spec(text, **each)) for each in options]
    text.write_text(text.read_text() + "More.")
    assert len({path, *others, ensure(data_spec(text))}) == 5


def test_ensure_returns_prepared_shards_of_this_tokenizer_only(shards, cache):
    assert ensure(data_spec(shards)) == shards
    with pytest.raises(UserError, match=r"made with tokenizer 'char', 'bpe:300' was asked for.*esper prepare"):
        ensure(data_spec(shards, "bpe:300"))
    assert not cache.exists()


def test_the_cache_follows_the_environment(text, tmp_path, monkeypatch):
    monkeypatch.delenv("ESPER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ensure(data_spec(text)).is_relative_to(tmp_path / "xdg" / "esper")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(UserError, match="cannot be written"):
        ensure(data_spec(text))


def ensured(source: object, tokenizer: str, **environment: str) -> subprocess.Popen:
    imports = "from esper.platform.spec import DataSpec; from esper.workers.tolaria.data import ensure"
    code = f"{imports}\nprint(ensure(DataSpec(source={str(source)!r}, tokenizer={tokenizer!r})))"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, stdout=PIPE, stderr=PIPE)


def test_several_processes_may_ensure_at_once(text, cache):
    processes = [ensured(text, "bpe:300") for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert {process.returncode for process in processes} == {0}, outputs
    assert {out.strip() for out, _ in outputs} == {str(next(cache.iterdir()))}
    assert len(list(cache.iterdir())) == 1  # the losers' work is gone
    TokenData.open(next(cache.iterdir()))


def test_offline_tinystories_falls_back_to_python_docs(cache):
    """In a process of its own with no hub: one sentence, the same text as made here."""
    process = ensured("tinystories", "char", HF_ENDPOINT="http://127.0.0.1:9", PYTHONHASHSEED="7")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    notice, *rest = err.splitlines()
    assert notice == "tinystories needs the Hugging Face hub, which does not answer: using python-docs instead."
    assert len(rest) == 2
    data = TokenData.open(Path(out.strip()))
    assert data.manifest.source == "python-docs"
    assert ensure(data_spec("python-docs")) == data.path
    train, _ = sources.split(sources.find("python-docs"), 0.1, None)  # which depends on nothing but the Python
    text = "".join(document + END for document in train)
    assert len(text) > 1_000_000
    assert data.tokenizer.decode(data.arrays["train"]) == text


def test_python_docs_are_english_without_surrogates(tmp_path):
    (tmp_path / "odd.py").write_text('class A:\n  """One \\ud800."""\n  def f(self):\n    """Two \\d."""\n')
    (tmp_path / "template.py").write_text("def {name}")
    assert list(sources.module_docs(tmp_path / "odd.py", "odd")) == ["odd.A\nOne ?.\n\nodd.A.f\nTwo \\d."]
    assert list(sources.module_docs(tmp_path / "template.py", "template")) == []


def test_tinystories_slice(tinystories, tmp_path):
    manifest = prepare(data_spec(tinystories, "bpe:1024", max_bytes=2_000_000), tmp_path / "out")
    train, valid = manifest.splits["train"], manifest.splits["valid"]
    assert (train.documents, train.tokens) == (2_434, 636_506)
    assert (valid.documents, valid.unseen) == (2_467, 0)
    assert manifest.fingerprint().startswith("57c54df3190043c3")  # the ids themselves
