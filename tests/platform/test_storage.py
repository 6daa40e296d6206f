"""Files are whole or absent, also on a full disk."""

import pytest

from esper.platform.storage import write_text


def test_a_write_that_a_full_disk_cuts_short_names_its_file_and_leaves_the_old_one(tmp_path, files_of_at_most):
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "before")
    with files_of_at_most(100), pytest.raises(OSError, match=f"too large: '{path}'$"):
        write_text(path, "x" * 1000)
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(OSError, match=f"'{path}/in it'$"):
        write_text(path / "in it", "text")
