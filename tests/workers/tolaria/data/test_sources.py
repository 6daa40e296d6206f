"""Sources: documents from files of all kinds, folders, the hub's format and the installed Python; and their split."""

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.workers.tolaria.data import files, sources

DOCUMENTS = [f"Story {i}: " + f"the cat saw {i} dogs. " * 10 for i in range(50)]
STRIPPED = [document.strip() for document in DOCUMENTS]


def write_txt(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(f"{document}\n{files.SEPARATOR}\n" for document in documents), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_jsonl(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return path


def mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed))
        changed[at : at + chance.choice([0, 1, 1, 9])] = chance.randbytes(chance.choice([0, 1, 1, 5]))
    return bytes(changed)


def load(path: Path | str, valid_fraction: float = 0.1, max_bytes: int | None = None) -> tuple[list[str], list[str]]:
    return sources.split(sources.find(str(path)), valid_fraction, max_bytes)


def test_txt_is_split_at_the_separator(tmp_path):
    path = write_txt(tmp_path / "a.txt", [*DOCUMENTS, " \n "])
    assert [text for text in files.read_file(path) if text] == STRIPPED


def test_txt_without_separator_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"Speaker {i}:\n" + "Speak, speak. " * 20 for i in range(100)]
    of_windows = "\ufeff" + "\n\n".join(paragraphs).replace("\n", "\r\n")
    (tmp_path / "play.txt").write_bytes(of_windows.encode())
    pieces = list(files.read_file(tmp_path / "play.txt"))
    assert all(piece.startswith("Speaker") for piece in pieces)
    assert all(1990 <= len(piece) <= 4000 for piece in pieces[:-1])
    assert "\n\n".join(pieces).replace(" ", "") == "\n\n".join(paragraphs).replace(" ", "")


@pytest.mark.parametrize("text", ["word " * 2000, "line of words\n" * 700, "x" * 9000])
def test_txt_without_blank_lines_is_cut_too(text):
    pieces = list(files.pieces(text))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 4000


@pytest.mark.parametrize(
    "columns",
    [
        {"text": [*DOCUMENTS, None], "title": [*DOCUMENTS, "a"]},
        {"story": [None, *DOCUMENTS], "id": [*range(51)]},
    ],
)
def test_text_or_the_only_strings_are_taken_and_nulls_left_out(tmp_path, columns):
    assert list(files.read_file(write_parquet(tmp_path / "a.parquet", **columns))) == DOCUMENTS
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    assert list(files.read_file(path)) == DOCUMENTS
    path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\r\n \r\n"))  # as Windows writes it
    assert list(files.read_file(path)) == DOCUMENTS


@pytest.mark.parametrize("columns", [{"a": ["x"], "b": ["y"]}, {"id": [1]}])
def test_without_a_clear_column_or_key_it_is_refused(tmp_path, columns):
    row = {name: values[0] for name, values in columns.items()}
    for path in (write_parquet(tmp_path / "a.parquet", **columns), write_jsonl(tmp_path / "a.jsonl", row)):
        with pytest.raises(UserError, match=f"{path} .*of {', '.join(columns)} none is called 'text'"):
            list(files.read_file(path))


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "cut o',
        b"[" * 100_000,
        b'["a"]',
        b'"a"',
        b'{"text": 3}',
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud83d"}',
    ],
)
def test_a_damaged_line_of_jsonl_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "whole"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl is no whole .jsonl file \(.*\): write it anew"):
        load(tmp_path / "a.jsonl")


WRITERS: dict[str, Callable[[Path], Path]] = {
    ".txt": lambda folder: write_txt(folder / "a.txt", DOCUMENTS),
    ".parquet": lambda folder: write_parquet(folder / "a.parquet", text=DOCUMENTS),
    ".jsonl": lambda folder: write_jsonl(folder / "a.jsonl", *({"text": text} for text in DOCUMENTS)),
}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(list(files.READERS)))
def test_any_mutated_file_is_read_or_refused_in_a_sentence(tmp_path_factory, seed, kind):
    chance, path = random.Random(seed), WRITERS[kind](tmp_path_factory.mktemp("mutated"))
    path.write_bytes(mutated(path.read_bytes(), chance))
    with contextlib.suppress(UserError):
        load(path)


@pytest.mark.parametrize("valid", ["valid.txt", "validation.txt", "validation-00000-of-00001.parquet"])
def test_folder_with_both_names_gives_the_splits(tmp_path, valid):
    write_txt(tmp_path / "train.txt", DOCUMENTS[:40])
    write_txt(tmp_path / "test.txt", ["left out"])
    if valid.endswith("parquet"):
        write_parquet(tmp_path / valid, text=STRIPPED[40:])
    else:
        write_txt(tmp_path / valid, DOCUMENTS[40:])
    assert load(tmp_path) == (STRIPPED[:40], STRIPPED[40:])


def test_other_folders_are_all_documents_in_order_of_names(tmp_path):
    write_txt(tmp_path / "b.txt", DOCUMENTS[25:])
    write_txt(tmp_path / "train.txt", ["a train without a valid is a document"])
    write_parquet(tmp_path / "a.parquet", text=DOCUMENTS[:25])
    train, held = load(tmp_path)
    everything = [*DOCUMENTS[:25], *STRIPPED[25:], "a train without a valid is a document"]
    assert sorted([*train, *held]) == sorted(everything)
    assert train == [document for document in everything if document in set(train)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tinystorys", "Did you mean 'tinystories'"),
        ("no/such/file", "no file or folder no/such/file"),
        ("missing.txt", "no file or folder missing.txt"),
        ("pyproject.toml", "no .txt, .parquet or .jsonl file"),
        (".", "holds no .txt, .parquet or .jsonl file"),
    ],
)
def test_what_is_no_source_is_refused(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    with pytest.raises(UserError, match=words):
        sources.find(source)


MANY = st.lists(st.text(min_size=1, max_size=9).filter(str.strip), min_size=12, max_size=30, unique=True)


@given(MANY, st.lists(st.integers(0, 11), max_size=5), st.floats(0.05, 0.4), st.randoms())
@settings(max_examples=30)
def test_hold_out_is_by_whole_documents_disjoint_and_free_of_order(documents, twice, fraction, rng: random.Random):
    documents = documents + [documents[i] for i in twice]
    kept, held = sources.hold_out(documents, fraction)
    assert sorted(kept + held) == sorted(documents)
    assert not set(kept) & set(held)
    assert sum(map(len, held)) >= fraction * sum(map(len, documents)) > 0
    assert sources.hold_out(rng.sample(documents, len(documents)), fraction)[1] == held


@given(st.text(st.sampled_from("ab \n"), min_size=40, max_size=30_000), st.floats(0.05, 0.95))
@settings(max_examples=30)
def test_of_a_running_text_the_end_is_held_out_as_one_block(text, fraction):
    pieces = list(files.pieces(text))
    kept, held = sources.hold_out(pieces, fraction)
    assert "".join(kept + held) == "".join(piece for piece in pieces if piece.strip())
    assert abs(sum(map(len, held)) - fraction * sum(map(len, pieces))) <= 1


def test_a_running_text_among_documents_is_not_dealt_out(tmp_path):
    """Its end is one block, wherever the documents beside it go."""
    numbers = "\n".join(f"number {i:06}" for i in range(3000))
    (tmp_path / "b.txt").write_text(numbers)
    WRITERS[".jsonl"](tmp_path)
    train, held = load(tmp_path)
    held_lines = [line for text in held for line in text.splitlines() if line.startswith("number")]
    assert "\n".join(held_lines) in numbers
    assert held_lines[-1] == "number 002999"
    assert len(held_lines) == pytest.approx(300, abs=2)
    assert len([text for text in train if text in DOCUMENTS]) + len([text for text in held if text in DOCUMENTS]) == 50


@given(st.lists(st.text(max_size=20)), st.integers(0, 100))
def test_cap_takes_whole_leading_documents(documents, max_bytes):
    taken = list(sources.cap(documents, max_bytes))
    present = [document for document in documents if document.strip()]
    assert taken == present[: len(taken)]
    assert sum(len(document.encode()) for document in taken) <= max_bytes
    if len(taken) < len(present):
        assert sum(len(document.encode()) for document in present[: len(taken) + 1]) > max_bytes


@pytest.mark.parametrize("own_split", [False, True])
def test_max_bytes_caps_the_training_text(tmp_path, own_split):
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    if own_split:
        write_txt(tmp_path / "valid.txt", DOCUMENTS[:9])
    train, held = load(tmp_path, valid_fraction=0.25, max_bytes=4000)
    assert 3000 < sum(map(len, train)) <= 4000
    assert len(held) == 9 if own_split else 800 < sum(map(len, held)) < 1800


def test_the_hubs_format_streams_through_datasets(tmp_path, monkeypatch):
    """The very call that reads the hub, on local files in its layout."""
    for split, documents in {"train": DOCUMENTS, "validation": DOCUMENTS[:5]}.items():
        texts = [f"{split} {document}" for document in documents]
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet", text=texts)
    monkeypatch.setattr(sources, "TINYSTORIES", str(tmp_path))
    train, held = load("tinystories", max_bytes=3000)
    assert train == [f"train {document}" for document in DOCUMENTS[: len(train)]]
    assert 0 < len(train) < len(DOCUMENTS)
    assert held == [f"validation {document}" for document in DOCUMENTS[:5]]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense", None])
def test_the_probe_sees_soon_that_nobody_answers(monkeypatch, endpoint):
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", endpoint or f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        assert not sources.hub_answers("a/b")
        assert time.perf_counter() - started < 5
