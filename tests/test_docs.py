"""The code of the documentation's pages runs, and does what they say of it."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esper.platform.contracts import HostShape
from esper.platform.errors import UserError
from esper.workers.kasmina import Kasmina
from tests.workers.kasmina.growing import assert_owned
from tests.workers.tolaria import nanogpt

DOCS = Path(__file__).parents[1] / "docs"


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
