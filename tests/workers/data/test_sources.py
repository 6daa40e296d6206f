"""Sources: documents from files of all kinds, folders, the hub's format and the installed Python; and their split."""

import http.server
import itertools
import json
import os
import random
import socket
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.workers.tolaria.data import TokenData, files, net, prepare, sources

DOCUMENTS = [f"Story {i}: " + f"the cat saw {i} dogs. " * 10 for i in range(50)]


def write_txt(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
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


def load(path: Path | str, valid_fraction: float = 0.1, max_bytes: int | None = None) -> tuple[list[str], list[str]]:
    return sources.split(sources.find(str(path)), valid_fraction, max_bytes)


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    """A local data set in the layout of roneneldan/TinyStories."""
    for split, documents in {"train": DOCUMENTS, "validation": DOCUMENTS[:5]}.items():
        texts = [f"{split} {document}" for document in documents]
        write_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet", text=texts)
    return tmp_path / "hub"


def test_txt_is_split_at_the_separator(tmp_path):
    path = write_txt(tmp_path / "a.txt", [*DOCUMENTS, " \n "])
    assert [text for text in files.read_txt(path) if text] == [document.strip() for document in DOCUMENTS]


def test_txt_without_separator_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"Speaker {i}:\n" + "Speak, speak. " * 20 for i in range(100)]
    of_windows = "\ufeff" + "\n\n".join(paragraphs).replace("\n", "\r\n")
    (tmp_path / "play.txt").write_bytes(of_windows.encode())
    pieces = list(files.read_txt(tmp_path / "play.txt"))
    assert all(piece.startswith("Speaker") for piece in pieces)
    assert all(2000 <= len(piece) <= 4000 for piece in pieces[:-1])
    assert "\n\n".join(pieces).replace(" ", "") == "\n\n".join(paragraphs).replace(" ", "")


@pytest.mark.parametrize("text", ["word " * 2000, "line of words\n" * 700, "x" * 9000])
def test_txt_without_blank_lines_is_cut_too(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    pieces = list(files.read_txt(tmp_path / "a.txt"))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 4000


@pytest.mark.parametrize(
    "columns", [{"text": DOCUMENTS, "title": DOCUMENTS}, {"story": [*DOCUMENTS, None], "id": range(51)}]
)
def test_parquet_takes_text_or_the_only_strings(tmp_path, columns):
    path = write_parquet(tmp_path / "a.parquet", **{name: list(values) for name, values in columns.items()})
    assert list(files.read_parquet(path)) == DOCUMENTS


@pytest.mark.parametrize("columns", [{"a": ["x"], "b": ["y"]}, {"id": [1]}])
def test_parquet_without_a_clear_column_is_refused(tmp_path, columns):
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=f"columns {', '.join(columns)}"):
        list(files.read_parquet(path))


@pytest.mark.parametrize(
    "values",
    [
        [{"title": "a story", "text": document} for document in DOCUMENTS],
        [{"story": document, "id": i} for i, document in enumerate(DOCUMENTS)],
        [{"story": None}, *({"story": document, "id": i} for i, document in enumerate(DOCUMENTS)), {"story": None}],
        [{"text": DOCUMENTS[0], "by": "me"}, {"text": None, "by": "you"}, *({"text": text} for text in DOCUMENTS[1:])],
        DOCUMENTS,
    ],
)
def test_jsonl_takes_text_or_the_only_strings(tmp_path, values):
    assert list(files.read_jsonl(write_jsonl(tmp_path / "a.jsonl", *values))) == DOCUMENTS


def test_jsonl_of_windows_with_blank_lines_is_read_too(tmp_path):
    texts = ["été\n\u2028 😀", 'a "b" c', "no line end"]
    lines = "\r\n \r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + lines.encode("utf-8-sig"))
    assert list(files.read_jsonl(tmp_path / "a.jsonl")) == texts


def test_jsonl_is_read_line_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 50_000 + "nonsense")
    texts = files.read_jsonl(tmp_path / "a.jsonl")
    tracemalloc.start()
    try:
        assert sum(1 for _ in itertools.islice(texts, 50_000)) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 300_000  # the file has 700,000 bytes
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match=r"line 50001 of .*a\.jsonl is not JSON"):
        next(texts)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut o', r"is not JSON \(Unterminated string.*\): give each text its own line"),
        (b"[" * 100_000, r"is not JSON \(.*recursion"),
        (b'["a"]', "is no object with a string under 'text': mend or delete"),
        (b'{"text": 3}', "is no object with a string under 'text'"),
        (b'{"story": "a"}', "is no object with a string under 'text'"),
        (b'{"text": "caf\xe9"}', r"is not UTF-8 text \(its byte 13\): convert"),
        (b'{"text": "\\ud83d"}', r"holds half a character \('\\ud83d'\)"),
    ],
)
def test_a_damaged_line_of_jsonl_is_refused_by_its_number(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "whole"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"^line 3 of .*a\.jsonl {words}"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("record", [{"a": "x", "b": "y"}, {"id": 1}, {"a": "x", "b": None}])
def test_jsonl_without_a_clear_key_is_refused(tmp_path, record):
    path = write_jsonl(tmp_path / "a.jsonl", record)
    with pytest.raises(UserError, match=f"line 1 of .* has the keys {', '.join(record)}, .*: name the one"):
        list(files.read_jsonl(path))


def test_a_folder_of_jsonl_is_prepared_with_its_splits(tmp_path, capsys):
    write_jsonl(tmp_path / "text" / "train-0.jsonl", *({"text": document} for document in DOCUMENTS[:20]))
    write_jsonl(tmp_path / "text" / "train-1.jsonl", *({"story": document} for document in DOCUMENTS[20:40]))
    write_jsonl(tmp_path / "text" / "valid.jsonl", *DOCUMENTS[40:])
    manifest = prepare(str(tmp_path / "text"), "char", tmp_path / "out")
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 40, "valid": 10}
    data = TokenData.open(tmp_path / "out")
    for name, documents in {"train": DOCUMENTS[:40], "valid": DOCUMENTS[40:]}.items():
        split = data.split(name)
        text = data.tokenizer.decode(split.windows(np.array([0]), split.tokens)[0])
        assert text == "".join(document + files.SEPARATOR for document in documents)


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        load(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        load(tmp_path / "b.txt")


@pytest.mark.parametrize("valid", ["valid.txt", "validation.txt", "validation-00000-of-00001.parquet"])
def test_folder_with_both_names_gives_the_splits(tmp_path, valid):
    write_txt(tmp_path / "train.txt", DOCUMENTS[:40])
    write_txt(tmp_path / "test.txt", ["left out"])
    write_txt(tmp_path / "x.txt", DOCUMENTS[40:])
    if valid.endswith("parquet"):
        write_parquet(tmp_path / valid, text=[document.strip() for document in DOCUMENTS[40:]])
    else:
        (tmp_path / "x.txt").rename(tmp_path / valid)
    train, held = load(tmp_path)
    assert train == [document.strip() for document in DOCUMENTS[:40]]
    assert held == [document.strip() for document in DOCUMENTS[40:]]


def test_other_folders_are_all_documents_in_order_of_names(tmp_path):
    write_txt(tmp_path / "b.txt", DOCUMENTS[25:])
    write_txt(tmp_path / "train.txt", ["a train without a valid is a document"])
    write_parquet(tmp_path / "a.parquet", text=DOCUMENTS[:25])
    train, held = load(tmp_path)
    everything = [*DOCUMENTS[:25], *(d.strip() for d in DOCUMENTS[25:]), "a train without a valid is a document"]
    assert sorted([*train, *held]) == sorted(everything)
    assert train == [document for document in everything if document in set(train)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tinystorys", "Did you mean 'tinystories'"),
        ("no/such/file", "no file or folder no/such/file"),
        ("missing.txt", "no file or folder missing.txt"),
        ("pyproject.toml", "no .txt, .parquet or .jsonl file"),
        ("infra/../.ci/..", "holds no .txt, .parquet or .jsonl file"),
    ],
)
def test_what_is_no_source_is_refused(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    for name in ("infra", ".ci"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=words):
        sources.find(source)


@given(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=30), st.floats(0.05, 0.95), st.randoms())
@settings(max_examples=50)
def test_hold_out_is_by_whole_documents_disjoint_and_free_of_order(documents, fraction, rng: random.Random):
    kept, held = sources.hold_out(documents, fraction)
    assert sorted(kept + held) == sorted(documents)
    assert not set(kept) & set(held)
    assert sum(map(len, held)) >= fraction * sum(map(len, documents)) > 0
    shuffled = rng.sample(documents, len(documents))
    assert sources.hold_out(shuffled, fraction)[1] == held


def test_hold_out_is_close_to_the_fraction():
    held = sources.hold_out([f"{i:04}" for i in range(1000)], 0.2)[1]
    assert len(held) == 200


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


def test_the_hubs_format_streams_through_datasets(hub_folder, monkeypatch):
    """The very call that reads the hub, on local files in its layout."""
    monkeypatch.setattr(sources, "TINYSTORIES", str(hub_folder))
    train, held = load("tinystories", max_bytes=3000)
    assert train == [f"train {document}" for document in DOCUMENTS[: len(train)]]
    assert 0 < len(train) < len(DOCUMENTS)
    assert held == [f"validation {document}" for document in DOCUMENTS[:5]]


def test_a_data_set_without_text_is_refused(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", story=["x"])
    with pytest.raises(UserError, match=r"KeyError.*try again, or name"):
        list(net.hub_texts(str(tmp_path), "train"))


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path's first part names."""

    def do_GET(self):
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def online(monkeypatch):
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(("status", "up"), [(200, True), (404, True), (503, False)])
def test_the_probe_asks_the_endpoint(server, monkeypatch, status, up):
    monkeypatch.setenv("HF_ENDPOINT", f"{server}/{status}/")
    assert net.hub_answers("a/b") is up


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense"])
def test_the_probe_sees_that_nobody_is_there(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert not net.hub_answers("a/b")


@pytest.mark.usefixtures("online")
def test_the_probe_does_not_wait_for_a_server_that_is_silent(monkeypatch):
    monkeypatch.setattr(net, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        assert not net.hub_answers("a/b")
        assert time.perf_counter() - started < 2


def test_set_offline_is_not_probed(monkeypatch):
    monkeypatch.setattr(net, "answers", lambda url: pytest.fail("probed"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not net.hub_answers("a/b")
