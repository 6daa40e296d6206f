"""The code of the documentation's pages runs, and does what they say of it."""

import inspect
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from esper.pipelines import policy, settings
from esper.pipelines.common import cli
from esper.pipelines.common.arguments import parse
from esper.platform.contracts import HostShape
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.host_spec import HostSpec
from esper.platform.spec import load_spec, presets
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.kasmina import Kasmina
from esper.workers.tolaria.export import export
from esper.workers.tolaria.model.transformer import TransformerHost
from tests.workers.kasmina.growing import assert_owned
from tests.workers.tolaria import nanogpt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [f"../{name}" for name in ("README.md", "CONTRIBUTING.md", "infra/README.md")] + [
    page.name for page in sorted(DOCS.glob("*.md"))
]


def blocks(page: str, language: str = "python") -> list[str]:
    """The code of a page's fenced blocks in a language, in their order; `""`: in none, as commands are."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for named, code in found if named == language]


def names_of(*codes: str) -> dict:
    """What code leaves, run in one namespace after another."""
    names = {"__name__": "page"}
    for code in codes:
        exec(compile(code, "page", "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "model", nanogpt)
    return blocks("your-own-model.md")


@torch.no_grad()
def same_logits(host, model) -> bool:
    idx = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    out = model.eval()(idx, idx) if isinstance(model, nanogpt.GPT) else model.eval()(idx)
    logits = out[0] if isinstance(out, tuple) else out.logits
    return torch.allclose(host.eval()(idx), logits, atol=1e-5)


def test_a_gpt_of_transformers_and_one_of_nanogpt_grow_as_the_page_says(page):
    names = names_of(page[0])
    assert (names["grown"].config.n_layer, names["grown"].config.n_inner) == (2, 192)
    assert same_logits(names["host"], names["grown"])
    names = names_of(page[1])
    assert names["host"].shape.depth() == 3
    assert same_logits(names["host"], names["grown"])


def test_the_pages_own_host_grows_and_shrinks_as_every_host_does(page):
    names = names_of(*page[2:])
    host, kasmina = names["host"], names["kasmina"]
    x, generator = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
    labels = torch.randint(10, (128,), generator=generator)
    losses = []
    for graft in (("h2.stream", "block"), ("h2.ffn", "ffn"), None):
        for _ in range(30):
            kasmina.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(host(x), labels)
            loss.backward()
            kasmina.step(max_norm=1.0)
            losses.append(loss.item())
        if graft is not None:
            before, after = host(x), kasmina.blueprints[graft[1]].resized(host.shape, graft[0])
            kasmina.graft(*graft)
            assert torch.allclose(host(x), before, atol=1e-5)
            assert host.shape == after
    assert losses[-1] < losses[0] / 2
    assert host.shape.parameters_count() == sum(p.numel() for p in host.parameters())
    assert [layer.uid for layer in host.shape.layers] == [2, 3, 0, 1]
    assert_owned(kasmina)
    with kasmina.masked("h2.stream"):
        without = host(x)
    kasmina.prune("h2.stream")
    assert torch.allclose(host(x), without, atol=1e-5)
    assert_owned(kasmina)


PROTOCOL = ("shape", "linears", "insert", "part", "remove", "stream_sizes", "written_by")


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        *((name, f"it lacks {name}:") for name in PROTOCOL),
        ("shape.injection_specs", r"it lacks shape\.injection_specs:"),
        ("shape.deepened", r"it lacks shape\.deepened:"),
        ("rows", r"linears\('h2\.ffn'\) has Linear, which lacks a matrix `weight` of a multiple of 16 rows:"),
        ("weight", r"linears\('h2\.ffn'\) has Identity, which lacks a matrix `weight`"),
    ],
)
def test_a_module_that_is_no_host_is_told_what_it_lacks(page, lacking, sentence):
    host, module = names_of(*page[2:])["host"], nn.Linear(3, 3)
    for name in PROTOCOL:
        if name != lacking:
            setattr(module, name, getattr(host, name))
    if lacking.startswith("shape."):
        methods = [name for name in vars(HostShape) if not name.startswith("_") and f"shape.{name}" != lacking]
        module.shape = SimpleNamespace(**{name: getattr(host.shape, name) for name in methods})
    elif lacking in ("rows", "weight"):
        other = nn.Linear(32, 81) if lacking == "rows" else nn.Identity()
        module.linears = lambda site_id: (other, host.linears(site_id)[-1])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError, match=rf"^Linear is no host that can grow: {sentence}[^\n]*your-own-model[^\n]*$"):
        Kasmina(module, torch.optim.AdamW(module.parameters()))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_the_environments_page_runs(shards, tiny_spec, tmp_path):
    from tests.pipelines.test_record import ended, recorded  # which imports this file

    (tmp_path / "demo").write_text(tiny_spec.model_dump_json())
    places = {"demo": tmp_path / "demo", "SHARDS": shards}
    places["RECORDING"] = recorded(tmp_path, [ended(tmp_path / "run", TamiyoPolicy(), 0, "tamiyo")[0]])
    making, learning = blocks("environments.md")
    for name, place in places.items():
        making = making.replace(f'"{name}"', repr(str(place)))
    names = names_of(making, learning.replace("20_000", "64").replace("gamma", "n_steps=64, gamma"))
    assert names["info"]["instance_id"] == 3


def test_what_text_md_loads_was_exported(tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    host = TransformerHost(HostSpec(n_layer=1), vocab_size=tokens.tokenizer.vocab_size)
    export(host, Path("DIR"), tokens.tokenizer)
    names = names_of(*blocks("text.md"))
    idx = torch.tensor([names["tokenizer"].encode("the cat")])
    assert torch.equal(names["host"](idx), host.eval()(idx))


def test_every_page_with_python_is_run():
    """Here, or in another file by `blocks` of its name."""
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    assert [page for page in PAGES if blocks(page) and f'blocks("{page}")' not in tests] == []


def block_lines(page: str) -> list[list[str]]:
    """The words of each command in a page's blocks, loops' variables put as 1; of a Ray job, the job's."""
    text = "\n".join(blocks(page, "")).replace("\\\n", "").replace("$arm", "static")
    starts = ("esper ", "make ", "python ", "ray job submit ")
    found = [each.strip() for each in text.splitlines() if each.strip().startswith(starts)]
    return [shlex.split(re.sub(r"\$\w+", "1", each), comments=True) for each in found]


def targets(words: list[str]) -> set[str]:
    """Those of `make` that there are none of."""
    there = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {word for word in words if "=" not in word} - {*there}


def model_of(words: list[str]) -> tuple[type[Frozen], list[str]]:
    """The model of the arguments of `esper WORDS`, and the words that it takes."""
    assert words[0] in cli.COMMANDS
    if words[0] == "policy":
        return policy.ACTIONS[words[1]][0], words[2:]
    main = import_module(f"esper.pipelines.{words[0]}").main
    return inspect.getclosurevars(main).nonlocals["model_class"], words[1:]


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_are_accepted(page):
    """Without being run: those of its blocks with all their values, those in its text by their flags."""
    for words in block_lines(page):
        _, program, *rest = ["", *words[words.index("--") + 1 if words[0] == "ray" else 0 :]]
        if program == "make":
            assert targets(rest) == set()
            continue
        if program != "esper":
            assert (ROOT / rest[0]).is_file()
            if not rest[0].startswith("pipelines/"):
                continue
            rest = [Path(rest[0]).stem, *rest[1:]]
        arguments: Any = parse(*model_of(rest))
        if getattr(arguments, "set", ()):
            load_spec(arguments.preset if arguments.preset in presets() else "tinystories-char", arguments.set)
    text = (DOCS / page).read_text(encoding="utf-8")
    for program, line in re.findall(r"`(make|esper) ([^`]+)`", text):
        words = shlex.split(line.replace("…", ""))
        if program == "make":
            assert targets(words) == set()
        elif words and words[0].islower():
            model = model_of([*words, "evaluate"])[0]
            known = {f"--{(field.alias or name).replace('_', '-')}" for name, field in model.model_fields.items()}
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}
    keys = {setting.key for group in settings.groups() for setting in group.settings}
    named = {key for key in re.findall(r"--set '?(\w+\.[\w.]+)=", text) if not key.startswith("growth.blueprints.")}
    assert named <= keys | {"key.path"}
