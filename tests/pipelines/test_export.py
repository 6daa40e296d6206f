"""`esper export` and `esper prepare` end to end: what they leave, and that `esper train` takes it."""

import json
import shutil
from textwrap import dedent

import pytest

from esper.pipelines import prepare, train
from esper.pipelines.export import main
from esper.workers.tolaria.data import TokenData


@pytest.fixture
def trained(tiny, text_file, tmp_path):
    """The folder of a run that grew, on text that `esper prepare` made."""
    out = tmp_path / "shards"
    assert prepare.main(["--data", str(text_file), "--out", str(out)]) == 0  # the default preset
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"at": 0.2, "blueprint": "ffn"}, {"at": 0.5, "blueprint": "block"}]))
    arguments = ["--data", str(out), "--out", str(tmp_path / "run"), "--schedule", str(plan)]
    assert train.main(["schedule", *tiny[:2], *arguments]) == 0
    return tmp_path / "run"


def test_a_grown_run_in_both_formats_and_without_its_text(trained, tmp_path, capfd):
    data = TokenData.open(tmp_path / "shards")
    assert data.manifest.max_bytes is None
    assert sum(split.documents for split in data.manifest.splits.values()) == 200
    assert json.loads((tmp_path / "shards" / "summary.json").read_text())["tokenizer"] == "char"
    capfd.readouterr()
    summary, native, gpt2 = json.loads((trained / "summary.json").read_text()), {}, {}
    assert len({layer["width"] for layer in summary["shape"]}) == 2  # MLPs of different widths
    for name, names in (("native", native), ("gpt2", gpt2)):
        assert main([str(trained), "--out", str(tmp_path / name), "--format", name]) == 0
        printed = capfd.readouterr().err
        assert f"{summary['parameters']:,} parameters in 2 layers" in printed
        exec(dedent(printed.partition("load it with:")[2]), names)  # the code that it prints
    assert sum(p.numel() for p in native["host"].parameters()) == summary["parameters"]
    assert gpt2["tokenizer"]("the cat")["input_ids"] == native["tokenizer"].encode("the cat")
    inputs = gpt2["tokenizer"]("the cat", return_tensors="pt")
    assert gpt2["model"].generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == len("the cat") + 3

    manifest = tmp_path / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(data.manifest.tokenizer_fingerprint, "another"))
    for out in ("a", "b"):
        assert main([str(trained), "--out", str(tmp_path / out)]) == 0
        printed = capfd.readouterr().err
        assert "the tokenizer is left out: " in printed
        assert "tokenizer = " not in printed
        assert [path.name for path in (tmp_path / out).iterdir()] == ["model.safetensors"]
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
