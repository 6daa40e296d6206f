"""An exported host is the host: Esper's own format to the bit and for any shape, GPT-2's as transformers runs it."""

import json
import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from esper import from_gpt2
from esper.platform import checkpoint
from esper.platform.errors import UserError
from esper.workers.kasmina import Kasmina
from esper.workers.tolaria.data import tokenizer
from esper.workers.tolaria.export import export, host_of, load_native, load_native_tokenizer
from tests.workers.growing_run import begun, odd
from tests.workers.kasmina.growing import batch, logits, resnet, small, train

DOCUMENTS = ["the cat sat on the mat, and it's 1234 birds that sang in the warm sun.\n\n\tHééé – 中文 😀!" * 3] * 9
LETTERS = sorted({*"".join(DOCUMENTS), *"'sl  \n\r\u00a0\u2028xé\u0301🦄"})


def grown(grafts, vocab_size=37, **changes):
    """A host after these grafts, with training between them."""
    host, kasmina = small(vocab_size, **{"block_size": 16, "n_head": 3, "n_embd": 16, "head_dim": 4, **changes})
    for site, blueprint in grafts:
        kasmina.graft(site, blueprint)
        train(host, kasmina, 3)
    return host


EVERY_KIND = (
    *(("h0.attention", "attention"), ("h0.ffn", "ffn"), ("h1.stream", "block"), ("h1.ffn", "expert")),
    *(("h2.attention", "attention"), ("h1.ffn", "expert"), ("h2.ffn", "ffn"), ("wte.stream", "block")),
)
FOR_GPT2 = (("h1.stream", "block"), ("h0.attention", "attention"), ("h1.ffn", "ffn"), ("h2.ffn", "ffn"))
"""Heads that fill the embedding in one layer only, and MLPs of three widths."""


@pytest.mark.parametrize("tied", [True, False])
def test_native_gives_the_host_back_to_the_bit_and_it_can_grow_on(tmp_path, tied):
    host = grown(EVERY_KIND, tied=tied)
    export(host, tmp_path / "host")
    loaded = load_native(tmp_path / "host")
    assert not loaded.training
    assert loaded.shape == host.shape
    assert (loaded.lm_head.weight is loaded.wte.weight) == tied
    assert torch.equal(logits(loaded), logits(host))
    Kasmina(loaded, torch.optim.AdamW(loaded.parameters())).graft("h2.stream", "block")
    assert torch.equal(logits(loaded), logits(host))
    assert loaded.shape == host.shape.with_layer("h2.stream")


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_resnet_is_given_back_to_the_bit_and_is_no_gpt2(tmp_path, norm):
    host, kasmina = resnet(norm=norm)
    for site, blueprint in (("h0.conv", "conv_width"), ("s1.stream", "conv_block"), ("h2.conv", "channel_attention")):
        kasmina.graft(site, blueprint)
        train(host, kasmina, 3)
    with pytest.raises(UserError, match="is a resnet, and no GPT-2"):
        export(host, tmp_path / "host", to="gpt2")
    export(host, tmp_path / "host")
    loaded = load_native(tmp_path / "host")
    assert loaded.shape == host.shape
    assert torch.equal(logits(loaded), logits(host))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: {**state, "vocab_size": 10**12},
        lambda state: {**state, "config": {**state["config"], "block_size": 17}},
        lambda state: {**state, "config": {**state["config"], "n_embd": 10**30}},
    ],
)
def test_another_shape_in_the_file_is_refused_and_not_allocated(tmp_path, change):
    export(grown(()), tmp_path / "host")
    state, tensors = checkpoint.read(tmp_path / "host" / "model.safetensors")
    checkpoint.write(tmp_path / "host" / "model.safetensors", change(state), tensors)
    with pytest.raises(UserError, match=r"^[^\n]*holds no exported host[^\n]*$"):
        load_native(tmp_path / "host")


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits(tmp_path, tied):
    """Of layers with different heads and widths too, filled up with zeros."""
    from transformers import GPT2LMHeadModel

    host = grown(FOR_GPT2, tied=tied, mlp_width=24)
    assert len({layer.width for layer in host.shape.layers}) == len({layer.heads for layer in host.shape.layers}) == 2
    with torch.no_grad():  # biases and norms are near their birth values: logits must depend on every one
        for parameter in host.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    export(host, tmp_path / "host", to="gpt2")
    model, loading = GPT2LMHeadModel.from_pretrained(tmp_path / "host", output_loading_info=True)
    assert not any(loading.values()), loading
    added = sum(p.numel() for p in model.parameters()) - host.shape.parameters_count()
    assert added > 0
    assert sum(int((p == 0).sum()) for p in model.parameters()) == added  # all of it zeros
    expected = logits(host)
    again = from_gpt2(tmp_path / "host")  # without the zeros
    assert [(each.heads, each.width) for each in again.shape.layers] == [(s.heads, s.width) for s in host.shape.layers]
    for found in (model(batch(host)).logits, logits(again)):
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize(
    ("grafts", "changes", "sentence"),
    [
        (2 * (("h1.attention", "attention"),), {}, r"layer h1 has 5 head\(s\) of 4 dimensions"),
        ((), {"head_dim": 5}, r"layer h0 has 3 head\(s\) of 5 dimensions"),
        ((("h1.ffn", "expert"),), {}, r"layer h1 has .* and 1 expert\(s\)"),
    ],
)
def test_a_shape_that_gpt2_has_not_is_refused_by_its_layer(tmp_path, grafts, changes, sentence):
    with pytest.raises(UserError, match=f"{sentence}.*native format.*train with --set 'growth.blueprints="):
        export(grown(grafts, **changes), tmp_path / "host", to="gpt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bpe:300", "char"])
def test_the_tokenizer_goes_along(tmp_path, name):
    ours = tokenizer.build(name, DOCUMENTS)
    host = grown((), vocab_size=ours.vocab_size)
    export(host, tmp_path / "host", ours)
    loaded = load_native_tokenizer(tmp_path / "host")
    assert loaded.decode(loaded.encode("the cat")) == "the cat"
    assert loaded.fingerprint == ours.fingerprint
    (tmp_path / "host" / ours.FILE).unlink()
    export(host, tmp_path / "without")
    for folder, sentence in (("host", "the tokenizer, cannot be read"), ("without", "exported without a tokenizer")):
        with pytest.raises(UserError, match=sentence):
            load_native_tokenizer(tmp_path / folder)
    with pytest.raises(UserError, match="give the one that its text was prepared with"):
        export(grown(()), tmp_path / "other", ours)


@pytest.fixture(scope="module", params=["bpe:300", "char"])
def both(request, tmp_path_factory):
    """Our tokenizer, and what transformers makes of its export."""
    from transformers import AutoTokenizer

    ours = tokenizer.build(request.param, DOCUMENTS)
    host = grown((), n_head=4, vocab_size=ours.vocab_size)
    folder = tmp_path_factory.mktemp("exported") / "host"
    export(host, folder, ours, to="gpt2")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == ours.end_id
    # The texts are not for the model: without this, transformers warns of one that is longer than its context.
    return ours, AutoTokenizer.from_pretrained(folder, model_max_length=10**9)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.text(st.sampled_from(LETTERS) | st.characters(codec="utf-8")).filter(lambda text: "<|" not in text)
)  # transformers reads a special token's name in a text as that token, ours does not
@example(document=DOCUMENTS[0])
@example(document="")
def test_transformers_reads_a_text_as_the_same_ids(both, document):
    ours, theirs = both
    ids = ours.encode_documents([document]).tolist()
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.end_id
    assert theirs(document)["input_ids"] == ours.encode(document) == ids[:-1]
    assert theirs(document + "<|endoftext|>")["input_ids"] == ids
    if ours.unseen_id not in ids:
        assert theirs.decode(ids) == ours.decode(ids) == document + "<|endoftext|>"


@pytest.fixture
def run(tiny_spec, tokens):
    return begun(tiny_spec, tokens, "ffn", "block", "attention", seed=5)


def test_the_host_of_a_saved_run_is_the_runs(run):
    values, tensors = run.state()
    host = host_of({**values, "train": {}}, tensors)
    assert torch.equal(logits(host), logits(run.trainer.host))
    assert host.shape == run.trainer.host.shape


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_an_odd_state_is_a_host_or_a_sentence(run, seed):
    chance, (values, tensors) = random.Random(seed), run.state()
    kept = {"spec": values["spec"], "now": {"layout": values["now"]["layout"]}}
    sentence = ""
    try:
        assert torch.isfinite(logits(host_of(odd(kept, chance), tensors))).all()
    except UserError as error:
        sentence = str(error)
    assert "\n" not in sentence
