"""Presets load, overrides reach any field, and every mistake is one sentence."""

import json

import pytest

from esper.pipelines.common.preset import check_fits
from esper.platform.errors import UserError
from esper.platform.spec import load_spec, presets


@pytest.mark.parametrize("name", presets())
def test_presets_load_fit_a_machine_and_survive_saving(name, tmp_path):
    spec = load_spec(name)
    assert spec.preset == name
    check_fits(spec)
    path = tmp_path / "spec.json"
    path.write_text(spec.model_dump_json())
    assert load_spec(path) == spec
    with pytest.raises(UserError, match="GiB of memory and this machine has"):
        check_fits(load_spec("demo", ["host.n_embd=65536", "host.n_layer=512", "growth.max_layers=512"]))


def test_any_field_is_overridable_of_a_preset_or_a_file(tmp_path):
    overrides = ["budget.decisions=12", "optimizer.betas=[0.8, 0.9]", "data.tokenizer=bpe:300"]
    spec = load_spec("tinystories-char", [*overrides, "growth.blueprints.ffn.width=7"])
    assert (spec.budget.decisions, spec.optimizer.betas, spec.data.tokenizer) == (12, (0.8, 0.9), "bpe:300")
    assert spec.growth.blueprints["ffn"] == {"width": 7}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"host": {"n_layer": 3}, "growth": {"max_layers": 3}}))
    spec = load_spec(str(path), overrides)
    assert (spec.preset, spec.host.n_layer, spec.budget.decisions) == ("mine", 3, 12)
    with pytest.raises(ValueError, match="frozen"):
        spec.threads = 3  # pyright: ignore[reportAttributeAccessIssue]


SIZES = """growth.max_layers host.n_layer host.n_head host.n_embd host.block_size host.mlp_width data.batch_size
threads data.eval_tokens data.decision_tokens ppo.hidden ppo.decisions ppo.minibatch fleet.workers budget.decisions"""


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("budget.amont=3", r"unknown key in the spec 'budget.amont'.*Did you mean 'budget.amount'"),
        ("budget.amount=-1", r"budget.amount is -1: input should be greater than 0"),
        ("budget.amount=NaN", r"finite"),
        ("budget.axis=furlongs", r"'furlongs'.*parameter_seconds"),
        ("host.n_head=5", r"n_embd is 32, which n_head = 5 does not divide"),
        ("host.n_layer=7", r"growth.max_layers is 6, but must be at least host.n_layer = 7"),
        ("optimizer.warmup=0.9", r"warmup is 0.9, but must be below decay_from"),
        ("optimizer.rates=[[200, 0.1], [100, 0.1]]", r"optimizer.rates: .* must rise"),
        ("laws.size=[2, 1]", r"laws.size: .* the lower number must be the first"),
        ("host.n_layer.x=2", r"host.n_layer is {'x': 2}: input should be a valid integer"),
        ("fleet.gpus=1.5", r"fleet.gpus: 1.5 does not add up to whole GPUs"),
        ("fleet.gpus=0.3", r"fleet.gpus: 0.3 does not add up to whole GPUs"),
        ("ppo.learner_gpus=0.7", r"ppo.learner_gpus: 0.7 does not add up to whole GPUs"),
        ("nonsense", r"not of the form key.path=value"),
        *((f"{size}=1000000000", "should be less than or equal to") for size in SIZES.split()),
    ],
)
def test_mistakes_are_one_sentence(override, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_spec("tinystories-char", [override])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"unknown preset 'tinystory'.*tinystories-char"):
        load_spec("tinystory", [override])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[" * 99_999, "not valid JSON"),
        ('{"threads": ' + "9" * 5000, "not valid JSON"),
        ('{"threads": 1e999}', "threads is inf"),
        ("[]", "valid dictionary"),
        ('{"budget": {"amont": 3}}', r"unknown key in .*'budget\.amont'"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_preset_file_is_named(tmp_path, content, sentence):
    path = tmp_path / "mine.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        load_spec(str(path), ["budget.decisions=4"])
    assert str(path) in str(error.value)
