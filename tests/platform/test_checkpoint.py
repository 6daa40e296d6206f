"""A checkpoint is whole or absent, comes back bit by bit, and is refused, in a sentence, when any byte differs."""

import hashlib
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.checkpoint import CheckpointStore, below, pack, read, unpack, write
from esper.platform.errors import UserError


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int], list[int]]]:
    """All there is to tensors; equal for equal NaNs, unequal for 0.0 and -0.0."""
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return {name: (tensor.dtype, list(tensor.shape), tensor.untyped_storage().tolist()) for name, tensor in own.items()}


BASE = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "base": BASE,
    "tied": torch.nn.Parameter(BASE),
    "row": BASE[1],
    "transposed": BASE.T,
    "expanded": torch.tensor(-0.0).expand(2, 3),
    "nan": torch.tensor(0x7FF8_0000_0000_0123).view(torch.float64),
    "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
    "large": torch.tensor([-(2**63), 2**63 - 1]),
    "flags": torch.tensor([True, False]),
}
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
INNER = LEAF | st.lists(LEAF, max_size=4) | st.dictionaries(st.text(), LEAF, max_size=4)


@given(state=INNER | st.lists(INNER, max_size=3))
def test_what_is_written_is_read_bit_by_bit_and_each_tensor_has_its_own_memory(state: Any):
    state_read, tensors = unpack(pack(state, TENSORS), "one")
    assert repr(state_read) == repr(state)  # types, the order of keys and -0.0 too
    assert bits(tensors) == bits(TENSORS)
    assert len({tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}) == len(TENSORS) - 1
    for tensor in tensors.values():
        tensor.zero_()  # it may be written to


WHOLE = pack(
    {"step": 12, "loss": 0.1, "names": ["é", None], "text": '"sha256":"' + "0" * 64},
    {"a": torch.arange(4, dtype=torch.int16), "b": torch.tensor(0.5, dtype=torch.float64), "sha256": torch.ones(1)},
)


def refuses(data: bytes) -> str:
    """The sentence with which a checkpoint is refused: one line, that names it and ends in a mend."""
    with pytest.raises(UserError, match=r"^checkpoint one is .*or start the run anew\.$") as caught:
        unpack(data, "one")
    return str(caught.value)


def test_what_differs_in_any_byte_or_in_length_or_was_written_by_another_is_refused(tmp_path: Path):
    unpack(WHOLE, "one")
    for place in range(len(WHOLE)):
        for flip in (255, 1 << place % 8):
            refuses(WHOLE[:place] + bytes([WHOLE[place] ^ flip]) + WHOLE[place + 1 :])
        refuses(WHOLE[:place])
    for added in (b"\0", WHOLE):
        refuses(WHOLE + added)
    refuses((2**20).to_bytes(8, "little") + b"[" * 2**20)
    other = safetensors.torch.save({}, {"version": "3"})
    assert "of version '3' and this code reads version 2, so go on with the Esper" in refuses(other)
    for state in ("{", "[" * 100_000):  # with a checksum that fits
        forged = safetensors.torch.save({}, {"version": "2", "state": state, "sha256": "0" * 64})
        refuses(forged.replace(b"0" * 64, hashlib.sha256(forged).hexdigest().encode()))
    for path, problem in ((tmp_path / "no", "is not there: name the file of one, or start"), (tmp_path, "damaged")):
        with pytest.raises(UserError, match=problem):
            read(path)


def filled(number: int, size: int = 10) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state and tensors that tell whose they are."""
    return {"number": number}, {"a": torch.full((size,), float(number))}


def number_of(found: tuple[Any, dict[str, torch.Tensor]] | None) -> int | None:
    """The number of what `filled` made, which must be whole."""
    if found is not None:
        assert (found[1]["a"] == found[0]["number"]).all()
    return found and found[0]["number"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["path", "uri"])
def test_the_newest_of_each_run_comes_back_and_nothing_else_is_there(kind: str, tmp_path: Path):
    before, folder = set(threading.enumerate()), tmp_path / "a" / "store"
    place = str(folder) if kind == "path" else folder.as_uri()
    with CheckpointStore(place) as store:
        for number in range(5):
            store.save("run", *filled(number))
        store.save("torn", *filled(9))
        store.save("third", *filled(1))
        assert number_of(store.find("run")) == 4
        store.drop("third")
        assert store.find("third") is None
        store.drop("nothing")
        store.save("late", *filled(7))
        (folder / "torn.safetensors").write_bytes((folder / "torn.safetensors").read_bytes()[:-1])
        assert store.find("torn") is None
    assert set(threading.enumerate()) <= before
    assert store.failed is None
    assert names(folder) == [f"{name}.safetensors" for name in ("late", "run", "torn")]
    assert number_of(read(folder / "run.safetensors")) == 4
    with CheckpointStore(place) as store:
        assert number_of(store.find("late")) == 7
        store.keep_only(["run"])
    assert names(folder) == ["run.safetensors"]


def test_a_place_below_another():
    assert below("s3://bucket/runs/?region=x", "one") == "s3://bucket/runs/one?region=x"
    assert below("/runs", "one") == "/runs/one"


def test_save_returns_at_once_and_only_the_newest_that_waits_is_written(tmp_path: Path, monkeypatch):
    written, slow = [], threading.Event()

    def recorded(state: Any, tensors: Any) -> bytes:
        written.append(state["number"])
        slow.wait(10)
        return pack(state, tensors)

    monkeypatch.setattr("esper.platform.checkpoint.pack", recorded)
    with CheckpointStore(tmp_path) as store:
        for number in range(101):
            store.save("run", *filled(number))
        slow.set()
        assert number_of(store.find("run")) == 100
    assert len(written) <= 2


def test_a_failure_is_said_once_and_later_saves_are_tried_again(tmp_path: Path, capsys, files_of_at_most):
    with CheckpointStore(tmp_path / "run") as store:
        store.save("one", *filled(2))
        for number, size, why in ((3, 10**6, "File too large"), (float("nan"), 1, "not JSON compliant")):
            with files_of_at_most(2**20):
                store.save("one", *filled(number, size))
                store.flush()
            assert str(store.failed).startswith(f"checkpoint one was not written to {tmp_path / 'run'} (")
            assert why in str(store.failed)
            assert names(tmp_path / "run") == ["one.safetensors"]
            assert number_of(store.find("one")) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        store.save("one", *filled(4))
        assert number_of(store.find("one")) == 4
        assert store.failed is None


def test_death_in_a_write_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "run.safetensors"
    write(path, *filled(1))
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom esper.platform import checkpoint\n"
        "os.fsync = lambda *_: os.kill(os.getpid(), 9)\n"
        "checkpoint.write(Path(sys.argv[1]), {'number': 2}, {'a': torch.full((9,), 2.0)})\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert number_of(read(path)) == 1
    assert len(names(tmp_path)) == 2
    write(path, *filled(3))
    assert names(tmp_path) == ["run.safetensors"]
