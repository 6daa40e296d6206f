"""Sources: documents from files of all kinds, folders and the hub's format; and their split."""

import json
import random
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.workers.tolaria.data import sources

DOCUMENTS = [f"Story {i}: " + f"the cat saw {i} dogs. " * 10 + "Bye." for i in range(50)]


def write(path: Path, documents: list, column: str = "text", **columns: list) -> Path:
    """The documents in the file's own format, with other columns beside them where it has columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: documents, **columns})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()), encoding="utf-8")
    else:
        path.write_text("".join(f"{document}\n{sources.SEPARATOR}\n" for document in documents), encoding="utf-8")
    return path


def load(path: Path | str, valid_fraction: float = 0.1, max_bytes: int | None = None) -> tuple[list[str], list[str]]:
    return sources.split(sources.find(str(path)), valid_fraction, max_bytes)


@pytest.mark.parametrize(("column", "other"), [("text", {"title": ["a"] * 51}), ("story", {"id": [*range(51)]})])
def test_text_or_the_only_strings_are_taken_and_nulls_left_out(tmp_path, column, other):
    for name in ("a.parquet", "a.jsonl"):
        path = write(tmp_path / name, [None, *DOCUMENTS], column, **other)
        assert list(sources.read_file(path)) == DOCUMENTS
    path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\r\n \r\n"))  # as Windows writes it
    assert list(sources.read_file(path)) == DOCUMENTS


@pytest.mark.parametrize(("documents", "others"), [(["x"], {"b": ["y"]}), ([1], {})])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_without_a_clear_column_or_key_it_is_refused(tmp_path, name, documents, others):
    path = write(tmp_path / name, documents, "a", **others)
    with pytest.raises(UserError, match=f"{path} .*of {', '.join(['a', *others])} none is called 'text'"):
        list(sources.read_file(path))


@pytest.mark.parametrize("line", [b'{"text": "cut o', b"[" * 100_000, b'["a"]', b'{"text": 3}', b'{"text": "\xe9"}'])
def test_a_damaged_line_of_jsonl_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "whole"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl is no whole .jsonl file \(.*\): write it anew"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("valid", ["valid.txt", "validation-00000-of-00001.parquet"])
def test_folder_with_both_names_gives_the_splits(tmp_path, valid):
    write(tmp_path / "train.txt", [*DOCUMENTS[:40], " \n "])
    write(tmp_path / "test.txt", ["left out"])
    write(tmp_path / valid, DOCUMENTS[40:])
    assert load(tmp_path) == (DOCUMENTS[:40], DOCUMENTS[40:])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tinystorys", "Did you mean 'tinystories'"),
        (__file__, "holds no text: give a .txt, .parquet or .jsonl file"),
        (str(Path(__file__).parent), "holds no text: give a .txt, .parquet or .jsonl file"),
    ],
)
def test_what_is_no_source_is_refused(source, words):
    with pytest.raises(UserError, match=words):
        sources.find(source)


MANY = st.lists(st.text(min_size=1, max_size=9).filter(str.strip), min_size=12, max_size=30, unique=True)


@given(MANY, st.lists(st.integers(0, 11), max_size=5), st.floats(0.05, 0.4), st.randoms())
def test_hold_out_is_by_whole_documents_disjoint_and_free_of_order(documents, twice, fraction, rng: random.Random):
    documents = documents + [documents[i] for i in twice]
    kept, held = sources.hold_out(documents, fraction)
    assert sorted(kept + held) == sorted(documents)
    assert not set(kept) & set(held)
    assert sum(map(len, held)) >= fraction * sum(map(len, documents)) > 0
    assert sources.hold_out(rng.sample(documents, len(documents)), fraction)[1] == held


RUNNING = st.text(st.sampled_from("ab \n"), min_size=40, max_size=99) | st.sampled_from(["word " * 2000, "x" * 9000])


@given(RUNNING, st.floats(0.05, 0.95))
def test_of_a_running_text_the_end_is_held_out_as_one_block(text, fraction):
    pieces = list(sources.pieces(text))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(map(len, pieces)) <= 4000
    kept, held = sources.hold_out(pieces, fraction)
    assert "".join(kept + held) == "".join(piece for piece in pieces if piece.strip())
    assert abs(sum(map(len, held)) - fraction * sum(map(len, pieces))) <= 1


def test_a_running_text_among_documents_is_not_dealt_out(tmp_path):
    """Its end is one block, wherever the documents beside it go."""
    numbers = "\n".join(f"number {i:06}" for i in range(3000))
    (tmp_path / "b.txt").write_text(numbers)
    write(tmp_path / "a.jsonl", DOCUMENTS)
    train, held = load(tmp_path)
    held_lines = [line for text in held for line in text.splitlines() if line.startswith("number")]
    assert "\n".join(held_lines) in numbers
    assert held_lines[-1] == "number 002999"
    assert len(held_lines) == pytest.approx(300, abs=2)
    assert sorted(text for text in train + held if text in DOCUMENTS) == sorted(DOCUMENTS)


@pytest.mark.parametrize("own_split", [False, True])
def test_max_bytes_caps_the_training_text(tmp_path, own_split):
    write(tmp_path / "train.txt", DOCUMENTS)
    if own_split:
        write(tmp_path / "valid.txt", DOCUMENTS[:9])
    train, held = load(tmp_path, valid_fraction=0.25, max_bytes=4000)
    assert 3000 < sum(map(len, train)) <= 4000
    assert list(sources.cap(["ab", " ", "é", "c"], 4)) == ["ab", "é"]  # whole leading documents, in bytes
    assert len(held) == 9 if own_split else 800 < sum(map(len, held)) < 1800


def test_the_hubs_format_streams_through_datasets(tmp_path, monkeypatch):
    """The very call that reads the hub, on local files in its layout."""
    for split, documents in {"train": DOCUMENTS, "validation": DOCUMENTS[:5]}.items():
        name = f"{split}-00000-of-00001-0123456789abcdef.parquet"
        write(tmp_path / "data" / name, [f"{split} {document}" for document in documents])
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
