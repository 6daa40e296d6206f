"""Whatever is wrong with a command line is one sentence and exit code 2, and nothing is left."""

import json

import pytest

from esper.pipelines.common import cli
from esper.platform import checkpoint
from esper.platform.law_file import CONSTANTS
from esper.platform.spec import load_spec
from esper.policies.simic.policy import FILE, SimicPolicy
from esper.workers.laws.surrogate import drawn_laws
from esper.workers.run import GrowthRun
from tests.pipelines.helpers import made_net

LINES = [
    ("train statik", "unknown arm 'statik'"),
    ("train ppo", "needs a trained policy"),
    ("train schedule", "needs a schedule"),
    ("train planner", "needs fitted laws: give --laws FILE, made by `esper policy fit RUNS --out FILE`"),
    ("train planner --laws nowhere.json", "--laws nowhere.json"),
    ("train static --laws x", "--laws is for arm 'planner'"),
    ("train static --schedule bad.json", "--schedule is for arm 'schedule', and 'static' does not use it"),
    ("train static --set budget.amount=0", "budget.amount is 0"),
    ('train static --set growth.blueprints={"fnn":{}}', "Did you mean 'ffn'"),
    ("train static --set data.kind=images", "unknown key in the spec"),
    ("train static --set data.kind=sound", "its kind must be"),
    ('train static --set data={"kind":"images"}', "which takes text"),
    ("train static --set data.tokenizer=bpe:300", "ask for 'char'"),
    ("train static --set host.block_size=100000", "too few for a context"),
    ("train static --task poems", "unknown task"),
    ("train static --out /proc/x", "--out /proc/x cannot be made"),
    ("train static --out .", "already holds another run"),
    ("sweep --arms ,", "names no arm"),
    ("sweep --arms static,tamio", "Did you mean 'tamiyo'"),
    ("sweep --arms static,static_final", "--arms names none such: add one, such as tamiyo"),
    ("sweep --arms static,tamiyo,static_final:ppo", "'static_final:ppo' cannot be"),
    ("sweep --arms tamiyo,static_final:random", "--arms names tamiyo"),
    ("sweep --arms tamiyo,lag:tamiyo", "'lag:tamiyo' cannot be"),
    ("sweep --arms schedule", "needs a schedule"),
    ("sweep --arms ppo --policy /nowhere", "policy /nowhere"),
    ("sweep --arms ppo:a", "arm 'ppo:a' needs its policy: give --policy a=PATH"),
    ("sweep --arms ppo:a --policy a=/nowhere", "policy /nowhere"),
    ("sweep --arms ppo:a --policy a=x --policy a=y", "arm 'ppo:a' has one already"),
    ("sweep --arms static --policy a=x", "which --arms lacks"),
    ("sweep --arms static,openloop", "give --policy CHECKPOINT"),
    ("sweep --arms static,planner", "needs fitted laws: give --laws FILE"),
    ("sweep --arms static --laws x", "no arm of --arms uses --laws"),
    ('sweep --arms static --set host.layers=[{"uid":0,"heads":2,"width":512}]', "static arms have sizes: leave it out"),
    ("sweep --arms static --policy /nowhere", "no arm of --arms uses --policy"),
    ("sweep --arms static,ppo --train-on laws", "give more, such as --sizes 1,2,4"),
    ("sweep --seeds 0", "--seeds '0' is no number of test seeds"),
    ("sweep --seeds auto", "or auto:N with the most that may be spent, 5 or more, as in auto:40"),
    ("sweep --seeds auto:4", "--seeds 'auto:4' is no number of test seeds"),
    ("sweep --seeds 3 --width 0.1", "give that too, such as --seeds auto:40"),
    ("sweep --seeds auto:9 --arms static", "name some of both in --arms"),
    ("sweep --sizes auto --tuning-seeds 0", "--sizes auto needs tuning seeds"),
    ("sweep --tune-lr --tuning-seeds 0", "--tuning-seeds is 0: give at least 1"),
    ("sweep --grid budget.amont=1,2", "budget.amont"),
    ("sweep --grid host.n_embd", "is not of the form"),
    ("sweep --grid host.n_embd=", "is not of the form"),
    ("sweep --grid host.n_embd=1 --grid host.n_embd=2", "twice"),
    ("sweep --grid budget.amount=1,2", "give --budgets 1,2"),
    ("sweep --grid data.tokenizer=char,bpe:64", "would change the data"),
    ("sweep --grid fleet.cpus=1,2", "changes no number of a run"),
    ("sweep --budgets 40,-1", "--budgets '40,-1' is not a list of positive numbers"),
    ("sweep --budgets 1e6,0", "is not a list of positive numbers"),
    ("sweep --budgets nan", "is not a list of positive numbers"),
    ("sweep --budgets 1e6,much", "is not a list of positive numbers"),
    ("sweep --budgets 40,7", "a budget of 7 steps in 8 decisions holds less than one optimizer step in each"),
    ("sweep --sizes one", "--sizes 'one' is not a list of sizes"),
    ("sweep --sizes 1,x96", "is not a list of sizes"),
    ("sweep --sizes 2h", "is not a list of sizes"),
    ("sweep --sizes 1,0", "layers is '0'"),
    ("sweep --sizes 2x0", "width is '0'"),
    ("sweep --resume /nowhere", "--resume takes everything from /nowhere"),
    ("prepare --data nowhere.txt", "nowhere.txt does not exist: name a file or folder, or one of python-docs, tinyst"),
    ("prepare --data nowhere", "unknown source 'nowhere': it must be one of an existing file or folder"),
    ("prepare --tokenizer words", "unknown tokenizer 'words'"),
]
OF_JSON = [  # what takes a file, what is in that (of laws: what is unlike good ones), and what is said
    ("train schedule --schedule", [{"at": 0.0, "blueprint": "blok"}], "Did you mean 'block'"),
    ("train schedule --schedule", [{"at": 1.5, "blueprint": "ffn"}], "less than or equal to 1"),
    ("train schedule --schedule", {}, "holds no list"),
    ("train planner --laws", {"preset": "demo"}, "runs of preset 'demo', and this one is of 'tiny'"),
    ("train planner --laws", {"tokenizer": "gpt2"}, "runs of tokenizer 'gpt2', and this one is of 'char'"),
    ("train planner --laws", {"version": 2}, "version is 2"),
    ("train planner --laws", {"noise": 0}, "noise is 0"),
    ("train planner --laws", {"ensemble": {}}, "its ensemble lacks data, "),
    ("train planner --laws", {"ensemble": dict.fromkeys(CONSTANTS, (1, 1)) | {"size": [1]}}, "not of equally many mem"),
]
# Of a controller, a run that was trained, a damaged one, and a file.
OF_FILES = [
    ("policy inform ppo", "'inform': it must be one of distill, evaluate, fit, info. Did you mean 'info'?"),
    ("policy info nowhere", "policy nowhere does not exist"),
    ("policy evaluate ppo --instances tset", "instances is 'tset': input should be 'train' or 'test'"),
    ("policy evaluate ppo --arms static,tamio", "unknown arm 'tamio'"),
    ('policy evaluate ppo --arms heads --set growth.blueprints={"ffn":{}}', "unknown blueprint in arm 'heads'"),
    ("policy evaluate ppo --episodes 65", "the test set has 64 instances"),
    ('policy evaluate ppo --set growth.blueprints={"blok":{}}', "unknown blueprint 'blok'"),
    ("policy evaluate ppo --data file --arms bound", "unknown arm on text (schedule: with --schedule FILE) 'bound'"),
    ("policy distill ppo", "out is missing"),
    ("policy distill ppo --out file", "is a file: name a new file"),
    ("policy fit run --out laws.json", "holds no ended run"),
    ("transfer --to demo", "give --policy CHECKPOINT"),
    ("transfer --policy ppo", "--to PRESET"),
    ("transfer --policy ppo --to dem", "Did you mean 'demo'"),
    ("transfer --policy nowhere --to demo", "policy nowhere does not exist"),
    ("transfer --policy ppo --to demo --arms nobody", "unknown arm 'nobody'"),  # before any training
    ("transfer --policy ppo --to demo --budgets -1", "is not a list of positive numbers"),
    ("transfer --resume ppo", "a folder that `esper transfer` made"),
    ("watch ppo", "holds no run that has come to a decision: name an output folder of `esper train`."),
    ("watch run --gif --out a.png", "an animation is a GIF, and a.png is not called so"),
    ("export nowhere --out out", "nowhere holds no run that has come to a decision: name an output folder"),
    ("export damaged --out out", "is damaged"),
    ("export run --out run", "--out run already holds another run"),
    ("export run --out file", "is a file"),
    ("export run", "out is missing"),
    ("export run --out out --format gguf", "input should be 'native' or 'gpt2'"),
    ("export run --out out --format gpt2", "layer h0 has 3 head(s)"),
]


@pytest.mark.parametrize(("line", "sentence"), LINES)
def test_what_is_asked_for_in_vain(tiny, tmp_path, refused, line, sentence):
    command, *words = line.split()
    refused(cli.main, [command, *tiny, "--out", tmp_path / "out", *words], sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("line", "content", "sentence"), OF_JSON)
def test_what_is_wrong_in_a_file(tiny, tiny_spec, tmp_path, refused, line, content, sentence):
    (command, arm, flag), path = line.split(), tmp_path / "file.json"
    good = json.loads(drawn_laws(tiny_spec, range(2)).model_dump_json())
    path.write_text(json.dumps(good | content if arm == "planner" else content))
    refused(cli.main, [command, arm, *tiny, flag, path, "--out", tmp_path / "out"], sentence)
    assert not (tmp_path / "out").exists()


def test_what_files_cannot_give(store, tiny_spec, tokens, tmp_path, refused):
    SimicPolicy(made_net(0, 0)).save(tmp_path / "ppo" / FILE)
    (tmp_path / "ppo" / "spec.json").write_text(load_spec("tinystories-char").model_dump_json())
    host = tiny_spec.host.model_copy(update={"n_head": 3, "head_dim": 8})  # which GPT-2's layout cannot have
    growth = GrowthRun(tiny_spec.model_copy(update={"host": host}), tokens)
    growth.reset()
    for name in ("run", "damaged"):
        checkpoint.write(tmp_path / name / "checkpoints" / "run.safetensors", *growth.state())
    (tmp_path / "run" / "spec.json").write_text(growth.spec.model_dump_json())
    (tmp_path / "damaged" / "checkpoints" / "run.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("text")
    before = {path.name for path in tmp_path.iterdir()}
    for line, sentence in OF_FILES:
        refused(cli.main, line.split(), sentence)
        assert {path.name for path in tmp_path.iterdir()} == before
