"""A file is whole or absent; an entry in a journal is whole, and there once, whatever was cut off."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.platform.journal import Journal, read_entries
from esper.platform.storage import write_text


def test_what_is_added_is_read_again_and_once_for_each_identity(tmp_path: Path):
    path, first = tmp_path / "run" / "points.jsonl", {"step": 4, "loss": math.inf, "name": "é\n"}
    journal = Journal(path, lambda entry: entry.get("step"))
    entries = [first, {"step": 4, "loss": 1.0}, {"tag": "a"}, {"tag": "a"}]  # the tags are of no identity
    assert [journal.add(entry) for entry in entries] == [True, False, True, True]
    journal.close()
    assert not journal.add({"step": 5})
    again = Journal(path, lambda entry: entry.get("step"))
    assert again.entries == read_entries(path) == [first, {"tag": "a"}, {"tag": "a"}]
    assert not again.add({"step": 4})
    again.close()


@given(kept=st.integers(0, 60))
def test_cut_anywhere_the_whole_lines_are_kept_and_the_rest_is_gone(kept: int, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "points.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5))[:kept])
    entries = [{"step": step} for step in range(path.read_bytes().count(b"\n"))]
    journal = Journal(path)
    assert journal.entries == entries
    journal.add({"step": 9})
    journal.close()
    assert read_entries(path) == [*entries, {"step": 9}]


@pytest.mark.parametrize("line", [b"\0\0\0", b"[1]", b"", b"{", b"[" * 100_000, b"1" * 5000, b"\xff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes):
    path = tmp_path / "points.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    for open_it in (read_entries, Journal):
        with pytest.raises(UserError, match=r"points\.jsonl is damaged in line 2 \(.*\): restore"):
            open_it(path)
    assert read_entries(tmp_path / "nothing") == []
    with pytest.raises(UserError, match=r"cannot be read \(.*\): make it a file that may be read"):
        read_entries(tmp_path / ("long" * 100))


def test_a_write_that_a_full_disk_cuts_short_names_its_file_and_leaves_the_old_one(tmp_path, files_of_at_most):
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "before")
    with files_of_at_most(100), pytest.raises(OSError, match=f"too large: '{path}'$"):
        write_text(path, "x" * 1000)
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(OSError, match=f"'{path}/in it'$"):
        write_text(path / "in it", "text")
