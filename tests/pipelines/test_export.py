"""`esper export` and `esper prepare` end to end: what they leave, that `esper train` takes it, and what they refuse.

Alone: `pytest tests/pipelines/test_export.py`.
"""

import json
import shutil

import pytest
import torch

from esper.pipelines import prepare, train
from esper.pipelines.export import main
from esper.platform import checkpoint
from esper.platform.spec import load_spec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.export import load_native, load_native_tokenizer


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
    from transformers import AutoTokenizer, GPT2LMHeadModel

    data = TokenData.open(tmp_path / "shards")
    assert data.manifest.max_bytes is None
    assert sum(split.documents for split in data.manifest.splits.values()) == 200
    assert json.loads((tmp_path / "shards" / "summary.json").read_text())["tokenizer"] == "char"
    capfd.readouterr()
    for name in ("native", "gpt2"):
        assert main([str(trained), "--out", str(tmp_path / name), "--format", name]) == 0
    printed = capfd.readouterr().err
    summary = json.loads((trained / "summary.json").read_text())
    assert len({layer["width"] for layer in summary["shape"]}) == 2  # MLPs of different widths
    assert f"{summary['parameters']:,} parameters in 2 layers" in printed
    assert f"host = load_native('{tmp_path / 'native'}')" in printed
    assert f"AutoTokenizer.from_pretrained('{tmp_path / 'gpt2'}')" in printed

    idx, run = torch.arange(16)[None], GrowthRun(load_spec(trained / "spec.json"), data)
    run.load(*checkpoint.read(trained / "checkpoints" / "run.safetensors"))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    with torch.no_grad():
        expected = run.trainer.host.eval()(idx)
        assert torch.equal(load_native(tmp_path / "native")(idx), expected)
        torch.testing.assert_close(theirs(idx).logits, expected, rtol=1e-5, atol=1e-5)
    ours, tokenizer = load_native_tokenizer(tmp_path / "native"), AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    assert tokenizer("the cat")["input_ids"] == ours.encode("the cat") == data.tokenizer.encode("the cat")
    inputs = tokenizer("the cat", return_tensors="pt")
    assert theirs.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == len("the cat") + 3

    manifest = tmp_path / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(data.manifest.tokenizer_fingerprint, "another"))
    for out in ("a", "b"):
        assert main([str(trained), "--out", str(tmp_path / out)]) == 0
        printed = capfd.readouterr().err
        assert "the tokenizer is left out: " in printed
        assert "tokenizer = " not in printed
        assert [path.name for path in (tmp_path / out).iterdir()] == ["model.safetensors"]
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)


def test_bad_input_is_one_sentence_and_leaves_nothing(tiny, tiny_spec, tokens, tmp_path, refused):
    host = tiny_spec.host.model_copy(update={"n_head": 3, "head_dim": 8})  # which GPT-2's layout cannot have
    growth = GrowthRun(tiny_spec.model_copy(update={"host": host}), tokens)
    growth.reset()
    for name in ("run", "damaged"):
        checkpoint.write(tmp_path / name / "checkpoints" / "run.safetensors", *growth.state())
    (tmp_path / "damaged" / "checkpoints" / "run.safetensors").write_bytes(b"")
    before, flags = sorted(path.name for path in tmp_path.iterdir()), " ".join(tiny)
    for command, arguments, sentence in (
        (main, "nowhere --out out", "nowhere/checkpoints/run.safetensors is not there"),
        (main, "damaged --out out", "is damaged"),
        (main, "run --out run", "--out run already holds another run"),
        (main, "run --out run/checkpoints/run.safetensors", "is a file"),
        (main, "run", "out is missing"),
        (main, "run --out out --format gguf", "input should be 'native' or 'gpt2'"),
        (main, "run --out out --format gpt2", "layer h0 has 3 head(s)"),
        (prepare.main, f"{flags} --out out --data /nowhere.txt", "unknown source '/nowhere.txt': it must be one of"),
        (prepare.main, f"{flags} --out out --tokenizer words", "unknown tokenizer 'words'"),
    ):
        refused(command, arguments.split(), sentence)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
