"""`esper export`, `sample`, `prepare`, `train --from` end to end: what they leave, and that training takes it."""

import json
import shutil
from textwrap import dedent

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from esper import from_gpt2
from esper.pipelines import prepare, train
from esper.pipelines.common import single_run
from esper.pipelines.tools import sample
from esper.pipelines.tools.export import main
from esper.platform import checkpoint
from esper.platform.errors import UserError
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.data.tokenizer import Characters
from esper.workers.tolaria.export import export, host_of, load_native, load_native_tokenizer
from tests.pipelines.helpers import planned, sets, summary_of


@pytest.fixture
def trained(tiny, text_file, tmp_path):
    """The folder of a run that grew, on text that `esper prepare` made."""
    out = tmp_path / "shards"
    assert prepare.main(["--data", str(text_file), "--out", str(out)]) == 0  # the default preset
    arguments = ["--data", str(out), "--out", str(tmp_path / "run"), *planned(tmp_path, {0.2: "ffn", 0.5: "block"})]
    assert train.main(["schedule", *tiny[:2], *arguments]) == 0
    return tmp_path / "run"


def test_a_grown_run_in_both_formats_and_without_its_text(trained, tmp_path, capfd):
    data = TokenData.open(tmp_path / "shards")
    assert data.manifest.max_bytes is None
    assert sum(split.documents for split in data.manifest.splits.values()) == 200
    assert summary_of(tmp_path / "shards")["tokenizer"] == "char"
    capfd.readouterr()
    summary, native, gpt2 = summary_of(trained), {}, {}
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


@pytest.fixture
def small(tiny_spec, tokens, tmp_path):
    """A folder that transformers wrote, of the text's vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": tokens.manifest.vocab_size, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**sizes, **drops, n_inner=24, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_trained_gpt2_goes_in_grows_and_comes_out_and_a_killed_run_ends_the_same(
    tiny, small, tokens, tiny_spec, tmp_path, monkeypatch
):
    """Its loss at the beginning is that of its weights."""
    from transformers import GPT2LMHeadModel

    plan = planned(tmp_path, {0.2: "ffn", 0.5: "block"})
    flags = ["schedule", *tiny, "--from", str(small), *plan, *sets('growth.blueprints={"ffn":{"width":8},"block":{}}')]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    with monkeypatch.context() as patch:  # killed before it had anything to train
        patch.setattr(single_run, "train", lambda *arguments: 0)
        assert train.main([*flags, "--out", str(tmp_path / "killed")]) == 0
    before = from_gpt2(small)
    shutil.rmtree(small)  # a run has a copy
    assert train.main(["--resume", str(tmp_path / "killed")]) == 0
    summary, resumed = summary_of(tmp_path / "run"), summary_of(tmp_path / "killed")
    assert (summary["val_loss"], summary["shape"]) == (resumed["val_loss"], resumed["shape"])
    inputs, targets = tokens.held_out(tiny_spec.data.held_out_tokens[1] // 16, tiny_spec, torch.device("cpu"))
    with torch.no_grad():
        loss = F.cross_entropy(before(inputs).flatten(0, 1), targets.flatten())
    assert summary["val_curve"][0]["val_loss"] == pytest.approx(loss.item(), rel=0.02)  # on other windows of the text
    assert summary["val_curve"][0]["parameters"] == before.shape.parameters_count()
    assert [layer["width"] for layer in summary["shape"]].count(24) == 2  # one of them is new
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "second-gpt2"), "--format", "gpt2"]) == 0
    grown = GPT2LMHeadModel.from_pretrained(tmp_path / "second-gpt2")
    host = host_of(*checkpoint.read(tmp_path / "run" / "checkpoints" / "run.safetensors"))
    with torch.no_grad():
        assert torch.allclose(grown(inputs).logits, host(inputs), atol=1e-5)
    (tmp_path / "killed" / "inputs" / "model.safetensors").write_bytes(b"")
    (tmp_path / "killed" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors was changed since the run began"):
        single_run.resume(tmp_path / "killed")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--from nowhere", "nowhere/config.json cannot be read"),
        ("--from small --set host.n_layer=2", "--set host.n_layer is not for --from"),
        ("--from small --set growth.max_layers=1", "growth.max_layers is 1, but must be at least host.n_layer = 2"),
        ("--from small --task digits --preset digits", "host is a transformer, which takes text, but data is images"),
        ("--from other", "other has 9 token ids, and the text"),
        ("--from mixed", "tokenizer.json gives other ids than the text has"),
        ("--from odd", "tokenizer.json cannot be read"),
        ("--resume small --from small", "leave out --from"),
    ],
)
def test_weights_that_cannot_be_trained_are_refused(tiny, small, tokens, refused, tmp_path, words, sentence):
    shutil.copytree(small, tmp_path / "other")
    state = safetensors.torch.load_file(small / "model.safetensors")
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:9].clone()
    safetensors.torch.save_file(state, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 9}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    tokenizer = tokens.tokenizer
    others = "\t" + tokenizer.decode(range(2, tokenizer.vocab_size - 1))  # as many, and each has another id
    for name, mixed in (("mixed", Characters(others)), ("odd", tokenizer)):
        export(from_gpt2(small), tmp_path / name, mixed, to="gpt2")
    (tmp_path / "odd" / "tokenizer.json").write_text("{}")
    flags = [] if "--resume" in words else ["static", *tiny, "--out", tmp_path / "out"]
    refused(train.main, [*flags, *words.split()], sentence)
    assert not (tmp_path / "out").exists()


def test_a_run_its_checkpoint_and_its_export_write_the_same_text(trained, tmp_path, capfd, refused):
    native, gpt2 = tmp_path / "native", tmp_path / "gpt2"
    assert main([str(trained), "--out", str(native)]) == 0

    def written(place, *arguments):
        capfd.readouterr()
        assert sample.main([str(place), "--prompt", "the cat", "--tokens", "40", *arguments]) == 0
        return capfd.readouterr().out.removesuffix("\n")

    text = written(trained)
    assert text.startswith("the cat")
    assert len("the cat") < len(text) <= len("the cat") + 40
    assert text == written(trained / "checkpoints" / "run.safetensors") == written(native)
    assert text != written(trained, "--seed", "1")
    host, tokenizer = load_native(native), load_native_tokenizer(native)
    ids = [tokenizer.end_id, *tokenizer.encode("the cat")]
    while len(ids) < 48 and (likeliest := int(host(torch.tensor([ids[-16:]]))[0, -1].argmax())) != tokenizer.end_id:
        ids.append(likeliest)
    assert written(trained, "--temperature", "0") == written(trained, "--top-k", "1") == tokenizer.decode(ids[1:])
    for arguments, sentence in (
        ([trained, "--prompt", "ЖΩ"], "the prompt has 'Ω' 'Ж', and the run's text had not"),
        ([tmp_path / "nowhere"], "holds no run that has come to a decision: name an output folder"),
        ([trained, "--temperature", "-1"], "temperature is"),
        ([trained, "--top-k", "0"], "top_k is"),
    ):
        refused(sample.main, arguments, sentence)
    assert main([str(trained), "--out", str(gpt2), "--format", "gpt2"]) == 0
    refused(sample.main, [gpt2], "is a GPT-2 for transformers")
