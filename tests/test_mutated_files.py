"""Every reader of a file: whatever its bytes are, it is read, or refused in one line.

Checkpoints and policies, whose checksums tell, and odd states that fit them have tests of their own.
"""

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.provenance import check_pins, pin
from esper.platform.spec import RunSpec, load_spec
from esper.platform.tracking import JOURNAL, Tracker, sync
from esper.workers.laws.surrogate import drawn_laws
from esper.workers.tolaria.data import TokenData, sources
from tests.workers.growing_run import mutated

ENTRIES = """{"kind":"run","experiment":"x","name":"n","key":"k","tags":{},"params":{},"parent":null,"at":1}
{"kind":"point","step":1,"at":1,"metrics":{"a":1.0}}
{"kind":"end","status":"FINISHED","at":2}
"""


@pytest.fixture(scope="module")
def whole(shards, template, tmp_path_factory) -> Path:
    """A folder with a file of every kind."""
    folder = shutil.copytree(shards, tmp_path_factory.mktemp("whole") / "folder")
    pin(folder, RunSpec(), data=None, inputs={})
    shutil.copy(template, folder / "store.db")
    (folder / JOURNAL).write_text(ENTRIES)
    (folder / "laws.json").write_text(drawn_laws(load_spec("tinystories-char"), range(2)).model_dump_json())
    stories = [f"Story {i}: " + f"the cat saw {i} dogs. " * 10 for i in range(50)]
    (folder / "a.txt").write_text(sources.SEPARATOR.join(stories))
    (folder / "a.jsonl").write_text("".join(f'{{"text": "{story}"}}\n' for story in stories))
    pq.write_table(pa.table({"text": stories}), folder / "a.parquet")
    return folder


def read_text(path: Path) -> None:
    sources.split(sources.find(str(path)), 0.1, None)


def read_journal(path: Path) -> None:
    sync(path.parent, f"sqlite:///{path.parent / 'store.db'}", seconds=0.5)
    Tracker(path.parent, "x", "n", key="k").close(seconds=0.01)


def read_shards(path: Path) -> None:
    for verify in (False, True):
        data = TokenData.open(path.parent, verify=verify)
        assert data.manifest.counts["train"] > 1000
        assert data.tokenizer.encode("cat")


READERS = {
    "spec.json": load_spec,
    "pins.json": lambda path: check_pins(path.parent, data=None),
    "laws.json": FittedLaws.read,
    JOURNAL: read_journal,
    **dict.fromkeys(("manifest.json", "characters.json", "train.arrow"), read_shards),
    **dict.fromkeys(("a.txt", "a.jsonl", "a.parquet"), read_text),
}


@pytest.mark.parametrize("name", READERS)
@given(chance=st.randoms(use_true_random=False))
def test_a_mutated_file_is_read_or_refused_in_a_sentence(name, chance, whole, tmp_path_factory):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("mutated") / "folder")
    (folder / name).write_bytes(mutated((folder / name).read_bytes(), chance))
    sentence = ""
    try:
        READERS[name](folder / name)
    except UserError as error:
        sentence = str(error)
    assert re.fullmatch(".{0,999}", sentence)  # of one line
