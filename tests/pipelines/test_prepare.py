"""`esper prepare` end to end: whole shards that other pipelines take, of the whole text, or one sentence."""

import json

import pytest

from esper.pipelines import train
from esper.pipelines.prepare import main
from esper.workers.tolaria.data import TokenData


def test_shards_of_the_whole_text_that_train_takes(tiny, text_file, tmp_path, capfd):
    out = tmp_path / "shards"
    assert main(["--data", str(text_file), "--tokenizer", "bpe:260", "--out", str(out)]) == 0  # the default preset
    manifest = TokenData.open(out).manifest
    assert manifest.max_bytes is None
    assert sum(split.documents for split in manifest.splits.values()) == 200
    assert json.loads((out / "summary.json").read_text())["tokenizer"] == "bpe:260"
    assert f"--data {out} --set data.tokenizer=bpe:260" in capfd.readouterr().err
    arguments = ["--data", str(out), "--set", "data.tokenizer=bpe:260", "--out", str(tmp_path / "run")]
    assert train.main(["static", *tiny[:2], *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "/nowhere.txt"], "no file or folder /nowhere.txt"),
        (["--tokenizer", "words"], "unknown tokenizer 'words'"),
    ],
)
def test_bad_input_leaves_nothing(tiny, tmp_path, capfd, arguments, sentence):
    assert main([*tiny, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
