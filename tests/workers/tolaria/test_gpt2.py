"""A GPT of another library is a host and comes back: transformers' `GPT2LMHeadModel`, nanoGPT's form, and folders."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.nanogpt import GPT, GPTConfig
from esper import from_gpt2, to_gpt2
from esper.platform.errors import UserError
from esper.workers.kasmina import Kasmina
from esper.workers.tolaria.export import export
from tests.workers.kasmina.growing import kasmina_of, train

SIZES = {"vocab_size": 37, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}


def hugging_face(scale=10.0, **changes):
    """One at random, whose weights are large enough for every part to move a logit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, **ends, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * scale * torch.randn(parameter.shape))
    return model


def nano(**changes):
    """One in nanoGPT's form."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"vocab_size": 37, "block_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **changes}))


IDX = torch.randint(37, (3, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def computed(model):
    out = model.eval()(IDX, IDX) if isinstance(model, GPT) else model.eval()(IDX)
    return getattr(out, "logits", out[0] if isinstance(out, tuple) else out)


def close(one, other):
    return float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_of_transformers_becomes_a_host_as_a_module_and_from_its_folder(tmp_path, activation, tied):
    model = hugging_face(activation_function=activation, tie_word_embeddings=tied, n_inner=24).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    host = from_gpt2(model)
    assert model.training
    assert host.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    read = from_gpt2(tmp_path / "saved")
    assert read.spec == host.spec
    assert (host.spec.activation, host.spec.tied, host.spec.dropout) == (activation, tied, 0.1)
    for each in (host, read):
        assert (each.lm_head.weight is each.wte.weight) == tied
        assert close(computed(each), computed(model))
    grafted = Kasmina(host, torch.optim.AdamW(host.parameters())).graft("h0.stream", "block")
    assert grafted.parameters == sum(p.numel() for p in host.part("h2").parameters())
    assert host.shape.layer("h2").width == 24
    assert close(computed(host), computed(model))


def test_grown_for_200_steps_it_is_one_of_transformers_again(tmp_path):
    from transformers import GPT2LMHeadModel

    host = from_gpt2(hugging_face(scale=0))
    kasmina = kasmina_of(host)
    losses = []
    for site, blueprint in (("h0.ffn", "ffn"), ("h0.stream", "block"), ("h2.ffn", "ffn"), ("wte.stream", "block")):
        kasmina.graft(site, blueprint)
        losses += train(host, kasmina, 50)
    assert losses[-1] < losses[0] / 2
    export(host, tmp_path / "grown", to="gpt2")
    grown = GPT2LMHeadModel.from_pretrained(tmp_path / "grown")
    assert (grown.config.n_layer, grown.config.n_inner) == (4, 128)
    assert close(computed(grown), computed(host))
    again = from_gpt2(tmp_path / "grown")  # without the zeros that made the layers alike
    assert [layer.width for layer in again.shape.layers] == [64, 128, 128, 64]
    assert again.shape.parameters_count() == host.shape.parameters_count()
    assert close(computed(again), computed(host))
    state = from_gpt2(grown).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_nanogpts_form_goes_in_and_out(bias, tied):
    model = nano(bias=bias, tied=tied)
    for attention in attentions(model):  # as where torch has no kernel: the mask, which is no weight
        attention.register_buffer("bias", torch.ones(16, 16).tril().view(1, 1, 16, 16))
    host = from_gpt2(model)
    assert (host.spec.activation, host.spec.tied, host.spec.dropout) == ("gelu", tied, 0.0)
    assert close(computed(host), computed(model))
    kasmina = kasmina_of(host)
    kasmina.graft("h1.stream", "block")
    train(host, kasmina, 5)
    grown = nano(n_layer=3, tied=tied)
    grown.load_state_dict(to_gpt2(host, linear=True))
    assert close(computed(grown), computed(host))


def test_a_model_in_half_precision_is_one_too():
    model = hugging_face()
    host = from_gpt2(model.bfloat16())
    assert host.wte.weight.dtype == torch.float32
    assert close(computed(host), computed(model.float()))


def changed(model, change):
    change(model)
    return model


def attentions(model):
    return [block.attn for block in model.transformer.h]


def shared():
    model = nano()
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    return model


NO_GPT2 = {
    "another kind": (lambda: nn.Linear(3, 3), "Linear lacks transformer.wte.weight: it must have nanoGPT's form"),
    "no head": (lambda: changed(hugging_face(), lambda m: delattr(m, "lm_head")), "lacks lm_head.weight"),
    "no norm": (
        lambda: changed(nano(), lambda m: delattr(m.transformer.h[1], "ln_2")),
        "GPT lacks transformer.h.1.ln_2.weight",
    ),
    "number of heads": (
        lambda: changed(
            nano(), lambda m: (delattr(m, "config"), [delattr(each.attn, "n_head") for each in m.transformer.h])
        ),
        "GPT lacks config.n_head",
    ),
    "a part more": (
        lambda: changed(nano(), lambda m: m.transformer.h[0].add_module("gate", nn.Linear(2, 2))),
        "GPT has h.0.gate.bias, which GPT-2 has not",
    ),
    "layers tied": (shared, "ties transformer.h.1.mlp.c_fc.weight to transformer.h.0.mlp.c_fc.weight"),
    "activation": (lambda: nano(activation=F.silu), "other logits from its weights than GPT-2 does"),
    "output": (lambda: changed(nano(), lambda m: setattr(m, "forward", lambda idx: {})), "cannot be copied and run"),
    "norm": (lambda: hugging_face(layer_norm_epsilon=1e-6), "layer norms with eps 1e-05"),
    "scores": (lambda: hugging_face(scale_attn_by_inverse_layer_idx=True), "attention of scores over √D"),
    "dropout": (lambda: hugging_face(embd_pdrop=0.3), r"dropouts of \[0.1, 0.3\]"),
}


@pytest.mark.parametrize("name", NO_GPT2)
def test_what_is_no_gpt2_is_refused_in_a_sentence(name):
    make, sentence = NO_GPT2[name]
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"^[^\n]*{sentence}[^\n]*$"):
        from_gpt2(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, r"config.json: model_type is 'llama': input should be 'gpt2'"),
        ({"activation_function": "relu"}, r"activation_function is 'relu': input should be 'gelu_new', 'gelu_pytorch"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True: input should be False"),
        ({"embd_pdrop": 0.3}, "resid_pdrop, embd_pdrop and attn_pdrop are"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ({"n_head": 3}, "is no GPT-2 .*: its tensors must have the shapes of one"),
        ({"n_head": None}, "n_head is None"),
    ],
)
def test_a_folder_whose_config_says_another_thing_is_refused(tmp_path, changes, sentence):
    hugging_face().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=rf"^[^\n]*{sentence}[^\n]*$"):
        from_gpt2(tmp_path)


def test_a_folder_that_lacks_a_file_or_has_a_damaged_one_is_refused(tmp_path):
    for missing in ("config.json", "model.safetensors"):
        folder = tmp_path / missing
        hugging_face().save_pretrained(folder)
        (folder / missing).unlink()
        with pytest.raises(UserError, match=rf"^[^\n]*{missing} cannot be read[^\n]*save_pretrained[^\n]*$"):
            from_gpt2(folder)
    (tmp_path / "model.safetensors" / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        from_gpt2(tmp_path / "model.safetensors")
