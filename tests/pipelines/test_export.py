"""`esper export` end to end: what it leaves of a run of `esper train`, and what it refuses.

Alone: `pytest tests/pipelines/test_export.py`.
"""

import json
import shutil

import pytest
import torch

from esper.pipelines import train
from esper.pipelines.export import main
from esper.platform.checkpoint import CheckpointStore
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.export import load_native, load_native_tokenizer


def trained(tiny, tmp_path, *arguments, arm="static"):
    """The folder of a run."""
    assert train.main([arm, *tiny, "--out", str(tmp_path / "run"), *arguments]) == 0
    return tmp_path / "run"


def logits_of(run, tokens):
    """What the run's host makes of some text, its newest checkpoint restored: (text, logits)."""
    restored = GrowthRun.restore(run / "checkpoints" / "run.safetensors", tokens)
    assert restored.ended
    idx = torch.arange(16)[None]
    with torch.no_grad():
        return idx, restored.trainer.host.eval()(idx)


def test_a_grown_run_in_esper_s_own_format(tiny, tokens, tmp_path, capfd):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"at": 0.2, "blueprint": "attention"}, {"at": 0.5, "blueprint": "block"}]))
    run = trained(tiny, tmp_path, "--schedule", str(plan), arm="schedule")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['parameters']:,} parameters in 2 layers" in printed
    assert f"host = load_native('{tmp_path / 'out'}')" in printed
    host = load_native(tmp_path / "out")
    idx, expected = logits_of(run, tokens)
    with torch.no_grad():
        assert torch.equal(host(idx), expected)
    assert load_native_tokenizer(tmp_path / "out").fingerprint == tokens.manifest.tokenizer_fingerprint


def test_a_run_for_transformers(tiny, tokens, tmp_path, capfd):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    run = trained(tiny, tmp_path)
    assert main([str(run), "--out", str(tmp_path / "out"), "--format", "gpt2"]) == 0
    assert f"AutoTokenizer.from_pretrained('{tmp_path / 'out'}')" in capfd.readouterr().err
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    idx, expected = logits_of(run, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, expected, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the cat")["input_ids"] == tokens.tokenizer.encode_documents(["the cat"]).tolist()[:-1]
    inputs = tokenizer("the cat", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == len("the cat") + 3


def test_without_its_text_the_tokenizer_is_left_out(tiny, shards, tmp_path, capfd):
    shutil.copytree(shards, tmp_path / "shards")
    run = trained([*tiny[:2], "--data", str(tmp_path / "shards")], tmp_path)
    manifest = tmp_path / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(TokenData.open(shards).manifest.tokenizer_fingerprint, "another"))
    assert main([str(run), "--out", str(tmp_path / "a")]) == 0
    assert "the tokenizer is left out: " in capfd.readouterr().err
    shutil.rmtree(tmp_path / "shards")
    assert main([str(run), "--out", str(tmp_path / "b")]) == 0
    printed = capfd.readouterr().err
    assert "the tokenizer is left out: " in printed
    assert "tokenizer = " not in printed
    for out in ("a", "b"):
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--out", "out"], "nowhere is no output folder of `esper train`"),
        (["bare", "--out", "out"], "run.safetensors is not there"),
        (["damaged", "--out", "out"], "is damaged"),
        (["run", "--out", "run"], "--out run already holds another run"),
        (["run", "--out", "run/spec.json"], "is a file"),
        (["run"], "--out is missing"),
        (["run", "--out", "out", "--format", "gguf"], "must be one of gpt2, native"),
        (["run", "--out", "out", "--format", "gpt2"], "layer 1 of 1 (h0) has 3 head(s)"),
        (["--out", "out"], "the following arguments are required: run"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tiny_spec, tokens, tmp_path, monkeypatch, capfd, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    host = tiny_spec.host.model_copy(update={"n_head": 3, "head_dim": 8})
    run, growth = tmp_path / "run", GrowthRun(tiny_spec.model_copy(update={"host": host}), tokens)
    growth.reset()
    with CheckpointStore(run / "checkpoints") as checkpoints:
        checkpoints.save("run", *growth.state())
    (run / "spec.json").write_text(growth.spec.model_dump_json())
    (tmp_path / "bare").mkdir()
    shutil.copy(run / "spec.json", tmp_path / "bare")
    shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "run.safetensors").write_bytes(b"")
    before = sorted(path.name for path in tmp_path.iterdir())
    capfd.readouterr()
    assert main(arguments) == 2
    errors = capfd.readouterr().err.splitlines()
    assert sentence in errors[-1]
    assert len([line for line in errors if line.startswith("error:")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
