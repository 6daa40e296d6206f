"""A point that is in the journal is whole, is there once, and keeps its first time stamp, whatever was cut off."""

import math
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from esper.platform.tracking_journal import Journal, Point, read_points

ROOT = Path(__file__).parents[2]


def test_what_is_added_is_read_again(tmp_path: Path):
    journal = Journal(tmp_path / "run" / "points.jsonl")
    assert journal.points == []
    assert journal.add(Point(4, 1000, {"loss": 1.5, "tokens": 64}))
    assert journal.add(Point(8, 2000, {"loss": math.inf}))
    journal.close()
    assert read_points(journal.path) == [
        Point(4, 1000, {"loss": 1.5, "tokens": 64.0}),
        Point(8, 2000, {"loss": math.inf}),
    ]


def test_a_point_of_the_same_keys_and_step_stays_as_it_was_first(tmp_path: Path):
    first = Point(4, 1000, {"loss": 1.5, "tokens": 64.0})
    with_other_keys = Point(4, 1500, {"annealed/loss": 1.2})
    journal = Journal(tmp_path / "points.jsonl")
    assert journal.add(first)
    journal.close()
    again = Journal(tmp_path / "points.jsonl")
    assert again.points == [first]
    assert not again.add(Point(4, 9000, {"tokens": 65.0, "loss": 1.4}))
    assert again.add(with_other_keys)
    again.close()
    assert not again.add(Point(5, 1, {"loss": 1.0}))
    assert read_points(again.path) == [first, with_other_keys]


@given(data=st.data())
def test_cut_anywhere_the_whole_lines_are_read_and_the_rest_is_gone(data: st.DataObject, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "points.jsonl"
    points = [Point(step, 1000 + step, {"loss": step / 3}) for step in range(4)]
    journal = Journal(path)
    for point in points:
        journal.add(point)
    journal.close()
    content = path.read_bytes()
    kept = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:kept])
    whole = content[:kept].count(b"\n")
    again = Journal(path)
    assert again.points == points[:whole]
    assert again.add(Point(9, 9, {"loss": 9.0}))
    again.close()
    assert read_points(path) == [*points[:whole], Point(9, 9, {"loss": 9.0})]


def test_a_line_that_a_loss_of_power_has_spoilt_is_passed_over(tmp_path: Path):
    path = tmp_path / "points.jsonl"
    good = '{"step": 1, "at": 2, "metrics": {"loss": 3.0}}\n'
    path.write_text(good + "\x00\x00\x00\n" + "[1]\n" + '{"step": 2}\n' + good.replace("1", "7"))
    assert [point.step for point in read_points(path)] == [1, 7]


def test_no_file_is_no_points(tmp_path: Path):
    assert read_points(tmp_path / "nothing") == []


def test_a_full_disk_is_an_error_and_not_half_a_line(tmp_path: Path):
    journal = Journal(tmp_path / "points.jsonl")
    journal.add(Point(1, 1, {"loss": 1.0}))
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from esper.platform.tracking_journal import Journal, Point\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "size = Path(sys.argv[1]).stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "try: journal.add(Point(2, 2, {'loss': 2.0}))\n"
        "except OSError: sys.exit(7)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(journal.path)], env=environment, check=False)
    assert done.returncode == 7
    assert journal.path.read_bytes().count(b"\n") == 1
    assert journal.path.read_bytes().endswith(b"\n")
    journal.close()
