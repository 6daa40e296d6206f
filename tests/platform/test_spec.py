"""Presets load, overrides reach any field, and every mistake is one sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.platform.memory import check_fits
from esper.platform.spec import RunSpec, load_spec, presets, saved_spec


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_saving(name, tmp_path):
    spec = load_spec(name)
    assert spec.preset == name
    path = tmp_path / "spec.json"
    path.write_text(spec.model_dump_json())
    assert saved_spec(path) == spec


def test_any_field_is_overridable():
    spec = load_spec(
        "tinystories-char",
        [
            "budget.decisions=12",
            "optimizer.betas=[0.8, 0.9]",
            "data.tokenizer=bpe:300",
            "growth.blueprints.ffn.width=7",
        ],
    )
    assert spec.budget.decisions == 12
    assert spec.optimizer.betas == (0.8, 0.9)
    assert spec.data.tokenizer == "bpe:300"
    assert spec.growth.blueprints["ffn"] == {"width": 7}


def test_a_preset_may_be_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"host": {"n_layer": 3}, "growth": {"max_layers": 3}}))
    spec = load_spec(str(path))
    assert (spec.preset, spec.host.n_layer) == ("mine", 3)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("budget.amont=3", r"unknown key in the spec 'budget.amont'.*Did you mean 'budget.amount'"),
        ("budget.amount=-1", r"budget.amount is -1: input should be greater than 0"),
        ("budget.amount=NaN", r"finite"),
        ("budget.axis=furlongs", r"'furlongs'.*parameter_seconds"),
        ("host.n_head=5", r"n_embd is 32, which n_head = 5 does not divide"),
        ("growth.max_layers=0", r"growth.max_layers is 0"),
        ("host.n_layer=7", r"growth.max_layers is 6, but must be at least host.n_layer = 7"),
        ("optimizer.warmup=0.9", r"warmup is 0.9, but must be below decay_from"),
        ("host.n_layer.x=2", r"'n_layer' is a value"),
        ("nonsense", r"not of the form key.path=value"),
    ],
)
def test_mistakes_are_one_sentence(override, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_spec("tinystories-char", [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"), [("{", "not valid JSON"), ("[]", "no JSON object"), (None, "cannot be read")]
)
def test_bad_preset_files(tmp_path, content, sentence):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_spec(str(path))


def test_an_unknown_preset_names_the_known():
    with pytest.raises(UserError, match=r"unknown preset 'tinystory'.*tinystories-char"):
        load_spec("tinystory")


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().threads = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "key",
    [
        *("growth.max_layers", "host.n_layer", "host.n_head", "host.n_embd", "host.block_size", "host.mlp_width"),
        *("data.batch_size", "data.eval_tokens", "ppo.hidden", "ppo.decisions", "ppo.minibatch", "fleet.workers"),
        *("budget.decisions", "threads"),
    ],
)
def test_a_size_that_memory_is_taken_for_has_a_bound(key):
    with pytest.raises(UserError, match="should be less than or equal to"):
        load_spec("demo", [f"{key}=1000000000"])


def test_what_no_machine_holds_is_refused_before_it_is_tried():
    spec = load_spec("demo", ["host.n_embd=65536", "host.n_layer=512", "growth.max_layers=512"])
    with pytest.raises(UserError, match="GiB of memory and this machine has"):
        check_fits(spec.training_bytes(), "training")
    for name in presets():
        check_fits(load_spec(name).training_bytes(), "training")


def test_a_mistake_in_a_preset_s_file_names_the_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"budget": {"amont": 3}}))
    with pytest.raises(UserError, match=r"unknown key in .*mine\.json 'budget\.amont'"):
        load_spec(str(path), ["budget.decisions=4"])


@given(data=st.data())
def test_a_mutated_spec_is_a_spec_or_a_sentence(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("spec") / "spec.json"
    text = load_spec("demo").model_dump_json().encode()
    begin = data.draw(st.integers(0, len(text)))
    piece = data.draw(st.binary(max_size=6) | st.sampled_from([b"[" * 9999, b"1e999", b"null", b'{"a":[', b"9" * 5000]))
    path.write_bytes(text[:begin] + piece + text[begin + data.draw(st.integers(0, 6)) :])
    try:
        saved_spec(path)
    except UserError as error:
        sentence = str(error)
    else:
        sentence = ""
    assert "\n" not in sentence
    assert len(sentence) < 1000
