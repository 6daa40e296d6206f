"""A checkpoint is whole or absent, comes back bit by bit, and is refused, in a sentence, when any byte of it differs.

Real files, paths and pyarrow URIs; real processes that are killed.
"""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.checkpoint import DTYPES, CheckpointStore, below, pack, read, unpack, write
from esper.platform.errors import UserError

NEW = "or start the run anew."


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """All there is to tensors; equal for equal NaNs, unequal for 0.0 and -0.0."""

    def raw(tensor: torch.Tensor) -> bytes:
        flat = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_neg().reshape(-1)
        return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""

    return {name: (tensor.dtype, list(tensor.shape), raw(tensor)) for name, tensor in tensors.items()}


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
    views = [
        tensor,
        tensor.permute(tuple(reversed(range(tensor.ndim)))),
        tensor[..., :1] if tensor.ndim else tensor,
        tensor.expand(3, *tensor.shape),
    ]
    return draw(st.sampled_from(views))


@given(state=json_values, tensors=st.dictionaries(st.text().filter("__metadata__".__ne__), any_tensor(), max_size=4))
def test_what_is_written_is_read_bit_by_bit(state: Any, tensors: dict[str, torch.Tensor]):
    state_read, tensors_read = unpack(pack(state, tensors), "one")
    assert repr(state_read) == repr(state)  # types, the order of keys and -0.0 too
    assert bits(tensors_read) == bits(tensors)
    for tensor in tensors_read.values():
        tensor.zero_()  # memory of its own, which may be written to


def test_every_type_makes_the_round_trip_empty_with_no_axis_and_as_a_matrix():
    tensors = {
        f"{dtype} {shape}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for dtype in DTYPES
        for shape in ((), (0,), (2, 0, 3), (3, 5))
    }
    assert bits(unpack(pack(None, tensors), "one")[1]) == bits(tensors)


def test_floats_come_back_exactly():
    rng = random.Random(0)
    floats = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(20_000)]
    floats = [x for x in floats if x - x == 0] + [0.1, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308]
    state, _ = unpack(pack({"floats": floats}, {}), "one")
    assert struct.pack(f"<{len(floats)}d", *state["floats"]) == struct.pack(f"<{len(floats)}d", *floats)


def test_tensors_that_share_memory_come_back_each_on_its_own():
    base = torch.arange(12.0).reshape(3, 4)
    negative = torch.tensor([3 - 4j]).conj().imag  # a flag on the view, its memory holds the opposite
    assert negative.is_neg()
    tensors = {"base": base, "tied": torch.nn.Parameter(base), "row": base[1], "T": base.T, "negative": negative}
    _, tensors_read = unpack(pack(None, tensors), "one")
    assert bits(tensors_read) == bits(tensors)
    assert len({tensor.data_ptr() for tensor in tensors_read.values()}) == len(tensors)
    assert not any(tensor.requires_grad for tensor in tensors_read.values())


@pytest.mark.parametrize(
    ("state", "tensors", "says"),
    [
        (float("nan"), {}, "the state is not JSON"),
        ([float("inf")], {}, "the state is not JSON"),
        ({"a": {1, 2}}, {}, "the state is not JSON"),
        ({1: "a"}, {}, "string keys"),
        ({"rng": (1, 2)}, {}, "lists for tuples"),
        (None, {"__metadata__": torch.ones(1)}, "keeps that name"),
        (None, {"a": torch.ones(1, dtype=torch.complex128)}, "'a' is torch.strided, torch.complex128 on cpu"),
        (None, {"a": torch.eye(2).to_sparse()}, "takes dense ones"),
        (None, {"a": torch.ones(1, device="meta")}, "on meta"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, state: Any, tensors: dict, says: str):
    with pytest.raises(ValueError, match=says):
        write(tmp_path / "one", state, tensors)
    assert list(tmp_path.iterdir()) == []


# Damage


WHOLE = pack(
    {"step": 12, "loss": 0.1, "names": ["é", None], "text": '"sha256":"' + "0" * 64},
    {"a": torch.arange(4, dtype=torch.int16), "b": torch.tensor(0.5, dtype=torch.float64), "sha256": torch.ones(1)},
)


def refusal(data: bytes) -> str:
    """The sentence with which a checkpoint is refused: one line, that names it and ends in a mend."""
    with pytest.raises(UserError) as caught:
        unpack(data, "one")
    sentence = str(caught.value)
    assert sentence.startswith("checkpoint one is ")
    assert sentence.endswith(NEW)
    assert "\n" not in sentence
    return sentence.removeprefix("checkpoint one is ")


def test_a_flip_in_any_byte_and_a_file_of_any_other_length_are_refused():
    unpack(WHOLE, "one")
    for place in range(len(WHOLE)):
        for flip in (255, 1 << place % 8):
            refusal(WHOLE[:place] + bytes([WHOLE[place] ^ flip]) + WHOLE[place + 1 :])
        refusal(WHOLE[:place])
    for more in (b"\0", b"\n", b" "):
        refusal(WHOLE + more)


@given(data=st.data())
def test_bytes_of_any_kind_are_refused_with_a_sentence(data: st.DataObject):
    begin = data.draw(st.integers(0, len(WHOLE)))
    piece = data.draw(st.binary(max_size=40) | st.just(b"[" * 100_000) | st.just(WHOLE))
    mutant = WHOLE[:begin] + piece + WHOLE[begin + data.draw(st.integers(0, 50)) :]
    if mutant != WHOLE:
        refusal(mutant)
    refusal(piece[:-1])


@pytest.mark.parametrize("version", ["1", "3", "", "two"])
def test_another_version_is_named_before_anything_else_is_looked_at(version: str):
    data = safetensors.torch.save({}, {"version": version})
    assert refusal(data) == (
        f"of version {version!r} and this code reads version 2: go on with the Esper that wrote it, {NEW}"
    )


def test_another_s_file_and_one_whose_checksum_fits_a_wrong_state_are_refused():
    assert "no checkpoint's file" in refusal(safetensors.torch.save({"a": torch.ones(2)}))
    assert "checksum" in refusal(safetensors.torch.save({}, {"version": "2", "state": "1"}))
    import hashlib

    forged = safetensors.torch.save({}, {"version": "2", "state": "{", "sha256": "0" * 64})
    forged = forged.replace(b"0" * 64, hashlib.sha256(forged).hexdigest().encode())
    assert refusal(forged).startswith("damaged (it cannot be read: ")


def test_no_file_and_a_folder_in_its_place_are_refused(tmp_path: Path):
    for place in (tmp_path / "nothing" / "deeper", (tmp_path / "nothing").as_uri()):
        with pytest.raises(UserError, match=rf"checkpoint {place} is not there: name the file of one, {NEW}"):
            read(place)
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path)


# A store


@pytest.fixture(params=["path", "uri"])
def place(request, tmp_path) -> str:
    """A folder as such, and as a filesystem that pyarrow reads and writes."""
    folder = tmp_path / "a" / "store"
    return str(folder) if request.param == "path" else folder.as_uri()


def filled(number: int, size: int = 10) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state and tensors that tell whose they are."""
    return {"number": number}, {"a": torch.full((size,), float(number))}


def number_of(found: tuple[Any, dict[str, torch.Tensor]]) -> int:
    """The number of what `filled` made, which must be whole."""
    state, tensors = found
    assert tensors.keys() == {"a"}
    assert (tensors["a"] == state["number"]).all()
    return state["number"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_of_each_run_comes_back_and_nothing_else_is_there(place: str, tmp_path: Path):
    before = set(threading.enumerate())
    with CheckpointStore(place) as store:
        for number in range(5):
            store.save("run", *filled(number))
        store.save("other", *filled(9))
        store.save("third", *filled(1))
        assert number_of(store.load("run")) == 4
        store.drop("third")
        assert store.find("third") is None
        store.drop("nothing")
        store.save("late", *filled(7))
    assert set(threading.enumerate()) <= before
    assert store.failed is None
    assert names(tmp_path / "a" / "store") == [f"{name}.safetensors" for name in ("late", "other", "run")]
    assert [number_of(CheckpointStore(place).load(name)) for name in ("run", "other", "late")] == [4, 9, 7]
    assert number_of(read(f"{place}/run.safetensors")) == 4
    with pytest.raises(ValueError, match="closed"):
        store.save("run", *filled(5))
    with CheckpointStore(place) as store:
        store.keep_only(["other"])
    assert names(tmp_path / "a" / "store") == ["other.safetensors"]


def test_a_missing_or_torn_one_is_none_to_find_and_an_error_to_load(place: str, tmp_path: Path):
    with CheckpointStore(place) as store:
        with pytest.raises(UserError, match=r"store/run\.safetensors is not there"):
            store.load("run")
        assert store.find("run") is None
        store.save("run", *filled(1))
        store.flush()
        path = tmp_path / "a" / "store" / "run.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert store.find("run") is None
        with pytest.raises(UserError, match="damaged"):
            store.load("run")
        store.keep_only([])
    CheckpointStore(tmp_path / "nothing").keep_only([])


@pytest.mark.parametrize("place", ["nonsense://there", "://"])
def test_an_unknown_kind_of_place(place: str):
    for use in (CheckpointStore, read):
        with pytest.raises(UserError, match="checkpoints cannot be kept in"):
            use(place)


def test_a_place_below_another():
    assert below("s3://bucket/runs/?region=x", "one") == "s3://bucket/runs/one?region=x"
    assert below("/runs", "one") == "/runs/one"


def test_save_returns_at_once_and_only_the_newest_that_waits_is_written(tmp_path: Path, monkeypatch):
    written = []
    slow = threading.Event()

    def recorded(state: Any, tensors: Any) -> bytes:
        slow.wait(10)
        written.append(state["number"])
        return pack(state, tensors)

    monkeypatch.setattr("esper.platform.checkpoint.pack", recorded)
    with CheckpointStore(tmp_path) as store:
        store.save("run", *filled(0))
        while store._waiting:
            time.sleep(0.001)
        begun = time.perf_counter()
        for number in range(1, 101):
            store.save("run", *filled(number))
        assert time.perf_counter() - begun < 0.1
        slow.set()
        assert number_of(store.load("run")) == 100
    assert written == [0, 100]


def test_a_failure_is_said_once_and_later_saves_are_tried_again(tmp_path: Path, capsys, files_of_at_most):
    folder = tmp_path / "run"
    folder.touch()  # a file in its place
    with CheckpointStore(folder) as store:
        for number in range(3):
            store.save("one", *filled(number))
            store.flush()
            assert str(store.failed).startswith(f"checkpoint one was not written to {folder} (")
        assert len(capsys.readouterr().err.splitlines()) == 1
        folder.unlink()
        store.save("one", *filled(2))
        assert number_of(store.load("one")) == 2
        assert store.failed is None
        with files_of_at_most(2**20):
            store.save("one", *filled(3, size=10**6))
            store.flush()
        assert "File too large" in str(store.failed)
        assert names(folder) == ["one.safetensors"]
        assert number_of(store.load("one")) == 2
        store.save("one", {"number": float("nan")}, {})
        store.flush()
        assert "the state is not JSON" in str(store.failed)
        assert len(capsys.readouterr().err.splitlines()) == 1


# Kill -9

SAVE_FOREVER = """
import itertools, sys, torch
from esper.platform.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1])
for number in itertools.count(int(sys.argv[2])):
    store.save("run", {"number": number}, {"a": torch.full((300_000,), float(number))})
    if number % 2 == 0:
        store.flush()
        print(number, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_leaves_a_whole_checkpoint_and_loses_none_that_was_flushed(tmp_path: Path, kills: int):
    rng = random.Random(0)
    latest = 0
    for _ in range(kills):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(latest + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            said = [int(process.stdout.readline())]
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            said += [int(line) for line in process.stdout]
            assert process.wait() == -signal.SIGKILL
        latest = number_of(read(tmp_path / "run.safetensors"))
        assert latest >= max(said)
    write(tmp_path / "run.safetensors", *filled(0))
    assert names(tmp_path) == ["run.safetensors"]  # nothing half is left lying


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_death_at_any_step_of_a_write_leaves_the_old_one(tmp_path: Path, call: str):
    path = tmp_path / "run.safetensors"
    write(path, *filled(1))
    code = (
        f"import os, sys, torch\nfrom pathlib import Path\nfrom esper.platform import checkpoint\n"
        f"{'os.fsync' if call == 'fsync' else 'Path.replace'} = lambda *_: os.kill(os.getpid(), 9)\n"
        "checkpoint.write(sys.argv[1], {'number': 2}, {'a': torch.full((9,), 2.0)})\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert number_of(read(path)) == 1
    assert len(names(tmp_path)) == 2
    write(path, *filled(3))
    assert names(tmp_path) == ["run.safetensors"]


def test_the_interpreter_waits_at_its_exit_for_a_checkpoint_that_nobody_closed(tmp_path: Path):
    code = (
        "import sys, torch\nfrom esper.platform.checkpoint import CheckpointStore\n"
        "CheckpointStore(sys.argv[1]).save('run', {'number': 5}, {'a': torch.full((10**6,), 5.0)})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ)
    assert number_of(read(tmp_path / "run.safetensors")) == 5
    assert json.dumps(names(tmp_path)) == '["run.safetensors"]'
