"""A checkpoint is whole or absent, comes back bit by bit, and is refused, in a sentence, when any byte of it differs.

Real files; real processes that are killed, at random moments and at every line of the code. Alone:
`pytest tests/platform/test_checkpoint.py` (about 13 s).
"""

import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.platform import checkpoint
from esper.platform.checkpoint import DTYPES, MANIFEST, STATE, TENSORS, Checkpoints, read, write
from esper.platform.errors import UserError

NEW = "or start the run anew."


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, list[int], bytes]:
    """All there is to a tensor; equal for equal NaNs, unequal for 0.0 and -0.0."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_neg().reshape(-1)
    return tensor.dtype, list(tensor.shape), bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def refusal(folder: Path) -> str:
    """The sentence with which `read` refuses a checkpoint: one line, that names it and ends in a mend."""
    with pytest.raises(UserError) as caught:
        read(folder)
    sentence = str(caught.value)
    assert sentence.startswith(f"checkpoint {folder} is ")
    assert sentence.endswith(NEW)
    assert "\n" not in sentence
    return sentence.removeprefix(f"checkpoint {folder} is ")


# Round trips

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    """Any type and shape, any bits, laid out plainly or as a view that is not contiguous, or is part of another."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numel = int(torch.Size(shape).numel())
    raw = bytearray(draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize)))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    tensor = (flat.bitwise_and(1).bool() if dtype == torch.bool else flat.view(dtype)).reshape(shape)
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t,
        lambda t: t.permute(tuple(reversed(range(t.ndim)))),
        lambda t: t[..., :1] if t.ndim else t,
        lambda t: t.expand(3, *t.shape),
    ]
    return draw(st.sampled_from(views))(tensor)


@settings(max_examples=60, deadline=None)
@given(state=json_values, tensors=st.dictionaries(st.text().filter("__metadata__".__ne__), any_tensor(), max_size=4))
def test_what_is_written_is_read_bit_by_bit(state: Any, tensors: dict[str, torch.Tensor]):
    with tempfile.TemporaryDirectory() as base:
        write(Path(base, "one"), state, tensors)
        state_read, tensors_read = read(Path(base, "one"))
    assert repr(state_read) == repr(state)  # types, the order of keys and -0.0 too
    assert {name: bits(tensor) for name, tensor in tensors_read.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }
    for tensor in tensors_read.values():
        tensor.zero_()  # memory of its own, which may be written to


def test_every_type_makes_the_round_trip_empty_with_no_axis_and_as_a_matrix(tmp_path: Path):
    tensors = {}
    for dtype in DTYPES:
        for shape in ((), (0,), (2, 0, 3), (3, 5)):
            tensors[f"{dtype} {shape}"] = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    write(tmp_path / "one", None, tensors)
    _, tensors_read = read(tmp_path / "one")
    assert {name: bits(tensor) for name, tensor in tensors_read.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }


def test_nothing_at_all_makes_the_round_trip(tmp_path: Path):
    write(tmp_path / "one", {}, {})
    assert read(tmp_path / "one") == ({}, {})


def test_floats_come_back_exactly(tmp_path: Path):
    rng = random.Random(0)
    floats = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(20_000)]
    floats = [x for x in floats if x - x == 0] + [0.1, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308]
    write(tmp_path / "one", {"floats": floats}, {})
    state, _ = read(tmp_path / "one")
    assert struct.pack(f"<{len(floats)}d", *state["floats"]) == struct.pack(f"<{len(floats)}d", *floats)


def test_tensors_that_share_memory_come_back_each_on_its_own(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(base)
    negative = torch.tensor([3 - 4j]).conj().imag  # a flag on the view, its memory holds the opposite
    assert negative.is_neg()
    assert negative.is_contiguous()
    tensors = {"base": base, "tied": parameter, "row": base[1], "column": base[:, 1], "T": base.T, "negative": negative}
    write(tmp_path / "one", None, tensors)
    _, tensors_read = read(tmp_path / "one")
    assert {name: bits(tensor) for name, tensor in tensors_read.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }
    assert len({tensor.data_ptr() for tensor in tensors_read.values()}) == len(tensors)
    assert not any(tensor.requires_grad for tensor in tensors_read.values())


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (float("nan"), "the state is not JSON"),
        ([float("inf")], "the state is not JSON"),
        ({"a": {1, 2}}, "the state is not JSON"),
        ({1: "a"}, "string keys"),
        ({"rng": (1, 2)}, "lists for tuples"),
    ],
)
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: Any, says: str):
    with pytest.raises(ValueError, match=says):
        write(tmp_path / "one", state, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("__metadata__", torch.ones(1), "keeps that name"),
        ("a", torch.ones(1, dtype=torch.complex128), "'a' is torch.strided, torch.complex128 on cpu"),
        ("a", torch.eye(2).to_sparse(), "takes dense ones"),
        ("a", torch.ones(1, device="meta"), "on meta"),
    ],
)
def test_a_tensor_that_would_not_come_back_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor, says: str):
    with pytest.raises(ValueError, match=says):
        write(tmp_path / "one", None, {name: tensor})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_overwritten(tmp_path: Path):
    write(tmp_path / "a" / "b" / "one", 1, {})
    with pytest.raises(FileExistsError):
        write(tmp_path / "a" / "b" / "one", 2, {})
    assert read(tmp_path / "a" / "b" / "one") == (1, {})
    assert sorted(path.name for path in (tmp_path / "a" / "b" / "one").iterdir()) == [MANIFEST, STATE, TENSORS]


# Damage


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A small checkpoint."""
    folder = tmp_path / "whole"
    tensors = {"a": torch.arange(4, dtype=torch.int16), "b": torch.tensor(0.5, dtype=torch.float64)}
    write(folder, {"step": 12, "loss": 0.1, "names": ["é", None]}, tensors)
    return folder


@pytest.mark.parametrize("name", [MANIFEST, STATE, TENSORS])
def test_a_flip_in_any_byte_is_refused(whole: Path, name: str):
    file = whole / name
    good = file.read_bytes()
    for place in range(len(good)):
        for flip in (255, 1 << place % 8):
            file.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
            sentence = refusal(whole)
            if name != MANIFEST:
                assert sentence.startswith(f"damaged ({name}: checksum differs): restore it from a copy, ")
    file.write_bytes(good)
    read(whole)


@pytest.mark.parametrize("name", [MANIFEST, STATE, TENSORS])
def test_a_file_cut_at_any_length_or_grown_is_refused(whole: Path, name: str):
    file = whole / name
    good = file.read_bytes()
    for length in range(len(good)):
        file.write_bytes(good[:length])
        sentence = refusal(whole)
        if name != MANIFEST:
            assert sentence.startswith(f"damaged ({name}: {length} bytes instead of {len(good)}): ")
    for more in (b"\0", b"\n", b" "):
        file.write_bytes(good + more)
        refusal(whole)


@pytest.mark.parametrize("name", [MANIFEST, STATE, TENSORS])
def test_a_file_that_is_missing_or_a_folder_is_refused(whole: Path, name: str):
    (whole / name).unlink()
    assert refusal(whole).startswith(f"damaged ({name} is missing): restore it from a copy, ")
    (whole / name).mkdir()
    assert refusal(whole).startswith(f"damaged ({name} cannot be read: Is a directory): ")


def test_files_that_changed_places_are_refused(whole: Path):
    (whole / STATE).rename(whole / "other")
    (whole / TENSORS).rename(whole / STATE)
    (whole / "other").rename(whole / TENSORS)
    assert refusal(whole).startswith(f"damaged ({STATE}: ")


@pytest.mark.parametrize("version", [0, 2, -1, 10**30])
def test_another_version_is_named_before_anything_else_is_looked_at(whole: Path, version: int):
    for path in whole.iterdir():
        path.unlink()
    (whole / MANIFEST).write_text(json.dumps({"version": version, "contents": []}))
    assert refusal(whole) == (
        f"of version {version} and this code reads version 1: go on with the Esper that wrote it, {NEW}"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{'version': 1}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"version": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"null", "names no version"),
        (b"[1]", "names no version"),
        (b"{}", "names no version"),
        (b'{"version": "1"}', "names no version"),
        (b'{"version": true}', "names no version"),
        (b'{"version": 1.0}', "names no version"),
        (b'{"version": 1}', "does not list the files"),
        (b'{"version": 1, "files": []}', "does not list the files"),
        (b'{"version": 1, "files": "state.json"}', "does not list the files"),
        (b'{"version": 1, "files": {"state.json": 3}}', "does not list the files"),
        (b'{"version": 1, "files": {"state.json": {"bytes": null}}}', "bytes instead of None"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(whole: Path, text: bytes, says: str):
    (whole / MANIFEST).write_bytes(text)
    sentence = refusal(whole)
    assert sentence.startswith("damaged (")
    assert says in sentence


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: json.dumps(manifest),
        lambda manifest: json.dumps(manifest, indent=2),  # no newline at its end
        lambda manifest: json.dumps(dict(reversed(manifest.items())), indent=2) + "\n",
        lambda manifest: json.dumps(manifest | {"note": 1}, indent=2) + "\n",
        lambda manifest: json.dumps(manifest | {"files": manifest["files"] | {"more": {}}}, indent=2) + "\n",
        lambda manifest: json.dumps(manifest, indent=2).replace('"bytes": ', '"bytes": 0, "bytes": ') + "\n",
        lambda manifest: json.dumps(manifest, indent=2).replace("version", "versio\\u006e") + "\n",
    ],
)
def test_a_manifest_in_another_form_is_refused(whole: Path, change: Callable[[Any], str]):
    (whole / MANIFEST).write_text(change(json.loads((whole / MANIFEST).read_text())))
    assert refusal(whole).startswith(f"damaged ({MANIFEST} is not in the form that it was written in): ")


@pytest.mark.parametrize(("name", "data"), [(STATE, b"{"), (STATE, b"\xff"), (TENSORS, b""), (TENSORS, b"\x08" * 64)])
def test_a_foreign_file_with_a_manifest_that_fits_is_refused(whole: Path, name: str, data: bytes):
    (whole / name).write_bytes(data)
    files = {each: checkpoint._measure(whole / each) for each in (STATE, TENSORS)}
    (whole / MANIFEST).write_bytes(checkpoint._manifest(files))
    assert refusal(whole).startswith("damaged (it cannot be read: ")


def test_no_folder_and_a_file_in_its_place_are_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for name in ("nothing", "file", "nothing/deeper", "file/deeper"):
        assert refusal(tmp_path / name) == f"not there: name the folder of one, {NEW}"


# A run's checkpoints


def filled(number: int, size: int = 10) -> dict[str, torch.Tensor]:
    """Tensors that tell whose they are."""
    return {"a": torch.full((size,), float(number)), "b": torch.tensor(number)}


def check(number: int, state: Any, tensors: dict[str, torch.Tensor]) -> int:
    """The number of a checkpoint of `filled` tensors, all of which must agree."""
    assert state == {"number": number}
    assert tensors.keys() == {"a", "b"}
    assert (tensors["a"] == number).all()
    assert tensors["b"] == number
    return number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_wins_and_is_the_only_one_left(tmp_path: Path):
    (tmp_path / ".number-000000003.0badcafe.partial").mkdir()
    (tmp_path / ".number-000000003.0badcafe.partial" / TENSORS).write_bytes(b"half")
    (tmp_path / "number-of-things").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        for number in (0, 9, 10, 999_999_999, 1_000_000_000):
            checkpoints.save(number, {"number": number}, filled(number))
            checkpoints.flush()
            assert names(tmp_path) == [f"number-{number:09d}", "number-of-things"]
            assert check(*checkpoints.latest()) == number
    assert check(*Checkpoints(tmp_path).latest()) == 1_000_000_000
    assert checkpoints.failed is None


def test_the_folder_is_made_and_closing_writes_what_waits_and_ends_the_thread(tmp_path: Path):
    before = set(threading.enumerate())
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        for number in range(5):
            checkpoints.save(number, {"number": number}, filled(number))
    assert set(threading.enumerate()) <= before
    assert check(*checkpoints.latest()) == 4
    checkpoints.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoints.save(5, {"number": 5}, filled(5))


def test_no_checkpoint_is_told_of(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(UserError) as caught:
            Checkpoints(folder).latest()
        assert str(caught.value) == f"{folder} holds no checkpoint: name the folder of a run that saved one, {NEW}"


def test_a_damaged_newest_is_refused_rather_than_passed_over(tmp_path: Path):
    write(tmp_path / "number-000000001", {"number": 1}, filled(1))
    write(tmp_path / "number-000000002", {"number": 2}, filled(2))
    (tmp_path / "number-000000002" / STATE).unlink()
    with pytest.raises(UserError, match=r"number-000000002 is damaged \(state.json is missing\)"):
        Checkpoints(tmp_path).latest()


def test_numbers_never_go_back(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, {"number": 7}, filled(7))
        with pytest.raises(UserError, match="checkpoint 6 cannot follow number 7"):
            checkpoints.save(6, {"number": 6}, filled(6))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="checkpoint 6 cannot follow number 7"):
            checkpoints.save(6, {"number": 6}, filled(6))
        with pytest.raises(ValueError, match="0 or more, not -1"):
            checkpoints.save(-1, {}, {})
        before = (tmp_path / "number-000000007" / MANIFEST).stat()
        checkpoints.save(7, {"number": 7}, filled(7))
        checkpoints.flush()
        assert (tmp_path / "number-000000007" / MANIFEST).stat() == before
        assert check(*checkpoints.latest()) == 7


renamed: list[str] | None = None  # names of checkpoints as they become whole, while a test listens


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if renamed is not None and event == "os.rename" and Path(arguments[1]).name.startswith("number-"):
        renamed.append(Path(arguments[1]).name)


def test_save_returns_at_once_and_a_newer_save_replaces_the_one_that_waits(tmp_path: Path):
    global renamed
    sys.addaudithook(listen)
    large = {f"p{i}": torch.ones(50_000) for i in range(500)}  # 100 MB
    small = {f"p{i}": torch.ones(1) for i in range(500)}
    renamed = []
    seconds = []
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, None, large)
        while not names(tmp_path):  # until it is being written
            time.sleep(0.001)
        for number in range(1, 101):
            start = time.perf_counter()
            checkpoints.save(number, {"number": number}, small)
            seconds.append(time.perf_counter() - start)
        checkpoints.flush()
        assert [renamed[0], renamed[-1]] == ["number-000000000", "number-000000100"]
        assert len(renamed) <= 3  # 2, but on a machine that stood still meanwhile
        assert checkpoints.latest()[1] == {"number": 100}
    renamed = None
    assert statistics.median(seconds) < 1e-3


def test_a_failure_is_said_once_and_later_saves_are_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    folder.touch()  # a file in its place
    with Checkpoints(folder) as checkpoints:
        for number in range(3):
            checkpoints.save(number, {"number": number}, filled(number))
            checkpoints.flush()
            assert checkpoints.failed == (
                f"checkpoint {number} was not written to {folder} (Not a directory): "
                "mend that while the run goes on, and its next one is written."
            )
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("checkpoint 0 was not written")

        folder.unlink()
        checkpoints.save(2, {"number": 2}, filled(2))  # the same number again: it is not there yet
        checkpoints.flush()
        assert checkpoints.failed is None
        assert check(*checkpoints.latest()) == 2

        shutil.rmtree(folder)  # removed under the run: made again
        checkpoints.save(3, {"number": 3}, filled(3))
        assert check(*checkpoints.latest()) == 3
        assert capsys.readouterr().err == ""

        checkpoints.save(4, {"number": float("nan")}, filled(4))
        checkpoints.flush()
        assert "the state is not JSON" in str(checkpoints.failed)
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert names(folder) == ["number-000000003"]


def test_a_full_disk_leaves_nothing_behind_and_the_last_checkpoint_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files_of_at_most
):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"number": 1}, filled(1))
        checkpoints.flush()
        with files_of_at_most(2**20):
            checkpoints.save(2, {"number": 2}, filled(2, size=10**6))
            checkpoints.flush()
        assert "File too large" in str(checkpoints.failed)
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert names(tmp_path) == ["number-000000001"]
        assert check(*checkpoints.latest()) == 1
        checkpoints.save(2, {"number": 2}, filled(2, size=10**6))
        assert check(*checkpoints.latest()) == 2
        assert names(tmp_path) == ["number-000000002"]


# Kill -9

NURSERY = '''
"""Forks a child for each line of standard input, and says when it is dead."""
import itertools, os, signal, sys, threading
from pathlib import Path
import torch
from esper.platform import checkpoint, storage
from esper.platform.checkpoint import Checkpoints

torch.set_num_threads(1)

def save(checkpoints, number, size):
    tensors = {"a": torch.full((size,), float(number)), "b": torch.tensor(number)}
    checkpoints.save(number, {"number": number}, tensors)

def forever(folder, number):
    """Save on and on; say which numbers are on the disk."""
    with Checkpoints(folder) as checkpoints:
        for number in itertools.count(number):
            save(checkpoints, number, 300_000)
            if number % 2 == 0:
                checkpoints.flush()
                os.write(1, b"%d\\n" % number)

def until_line(folder, number, lines):
    """Save once, and die before the given line of the code that does it, counted as they are run."""
    left = itertools.count(lines, -1)
    def trace(frame, event, argument):
        if frame.f_code.co_filename not in (checkpoint.__file__, storage.__file__):
            return None
        if event == "line" and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    threading.settrace(trace)
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, number, 10)

def unclosed(folder, number):
    """Save, and leave without a word."""
    save(Checkpoints(folder), number, 10**6)

for line in sys.stdin:
    what, folder, *numbers = line.split("\\t")
    child = os.fork()
    if not child:
        globals()[what](Path(folder), *map(int, numbers))
        sys.exit(0)
    os.write(1, b"%d\\n" % child)
    os.write(1, b"dead %d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''


class Nursery:
    """Children made in milliseconds, since the process that forks them has torch loaded."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdin
        assert self.process.stdout
        self.send, self.lines = self.process.stdin, self.process.stdout

    def start(self, what: str, folder: Path, *numbers: int) -> int:
        """Start a child; its pid."""
        self.send.write("\t".join([what, str(folder), *map(str, numbers)]) + "\n")
        return int(self.lines.readline())

    def end(self) -> tuple[list[int], int]:
        """Wait for its end: the numbers it said, and its exit code."""
        said = []
        while not (line := self.lines.readline()).startswith("dead"):
            said.append(int(line))
        return said, int(line.split()[1])


@pytest.fixture(scope="module", autouse=True)  # from the first test on: loading torch takes it seconds
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.send.close()
    assert made.process.wait() == 0
    made.lines.close()


def test_sigkill_at_a_random_moment_leaves_a_whole_checkpoint_and_loses_none_that_was_flushed(
    tmp_path: Path, nursery: Nursery
):
    rng = random.Random(0)
    latest, partial = 0, 0
    for _ in range(20):
        pid = nursery.start("forever", tmp_path, latest + 1)
        first = int(nursery.lines.readline())
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        said, code = nursery.end()
        assert code == -signal.SIGKILL
        latest = check(*Checkpoints(tmp_path).latest())
        assert latest >= max([first, *said])
        for name in names(tmp_path):
            if name.startswith("number-"):
                read(tmp_path / name)
        partial += sum(name.startswith(".") for name in names(tmp_path))
    assert partial  # it did hit something


def test_sigkill_before_any_line_of_the_code_leaves_a_whole_checkpoint(tmp_path: Path, nursery: Nursery):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"number": 0}, filled(0))
    latest, kept, died, partial = 0, 0, 0, 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        nursery.start("until_line", tmp_path, latest + 1, died)
        _, code = nursery.end()
        now = check(*Checkpoints(tmp_path).latest())
        assert now in (latest, latest + 1)
        for name in names(tmp_path):
            if name.startswith("number-"):
                read(tmp_path / name)
        if now > latest and code:  # or a longer list of older ones would mean more lines each time
            shutil.rmtree(tmp_path / f"number-{latest:09d}", ignore_errors=True)
        kept += now == latest
        partial += any(name.startswith(".") for name in names(tmp_path))
        latest = now
        died += 1
    assert code == 0
    assert names(tmp_path) == [f"number-{latest:09d}"]
    assert kept > 20  # it died before and after the rename, and in between
    assert latest > 10
    assert partial > 20


def test_the_interpreter_waits_at_its_exit_for_a_checkpoint_that_nobody_closed(tmp_path: Path, nursery: Nursery):
    nursery.start("unclosed", tmp_path, 5)
    assert nursery.end() == ([], 0)
    assert check(*Checkpoints(tmp_path).latest()) == 5
