"""Files are whole or absent, also on a full disk."""

import pytest

from esper.platform.storage import write_text


def test_a_write_that_a_full_disk_cuts_short_names_its_file_and_leaves_the_old_one(tmp_path, files_of_at_most):
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "before")
    with files_of_at_most(100), pytest.raises(OSError, match="too large") as caught:
        write_text(path, "x" * 1000)
    assert str(caught.value).endswith(f"'{path}'")
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_that_is_a_file_is_named_too(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists") as caught:
        write_text(tmp_path / "file" / "in it", "text")
    assert caught.value.filename == str(tmp_path / "file" / "in it")
