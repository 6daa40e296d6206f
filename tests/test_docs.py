"""All Python of the documentation's pages runs, and does what they say of it."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from benchmarks import nanogpt
from esper.pipelines.common import cli
from esper.platform.contracts import HostShape, Instance
from esper.platform.errors import UserError
from esper.platform.host_spec import HostSpec
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.environment import growth_env
from esper.workers.kasmina import Kasmina, registry
from esper.workers.tolaria.export import export
from esper.workers.tolaria.model.transformer import TransformerHost
from tests.pages import PAGES, RECORDED, ROOT, after_each, blocks
from tests.pipelines.helpers import summary_of
from tests.pipelines.reports.synthetic_sweeps import SyntheticSweep, log
from tests.pipelines.test_record import ended, recorded
from tests.workers.kasmina.growing import assert_owned

PYTHON: dict[str, Callable[..., None]] = {}  # page → what its code takes from its reader, and what holds after it


def of(page: str):
    return lambda function: PYTHON.setdefault(page, function)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_all_python_of_a_page_runs(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))  # a page's own blueprint is forgotten
    ran = []

    def run(words: dict[str, Any] | None = None, **names: Any) -> list[dict[str, Any]]:
        """Every block, with `words` in the place of others and with `names` that it finds; all names after each."""
        codes = blocks(page)
        for word, other in (words or {}).items():
            assert any(word in code for code in codes)
            codes = [code.replace(word, str(other)) for code in codes]
        ran.extend(codes)
        return after_each(codes, **names)

    PYTHON[page](request.getfixturevalue, run)  # to be written, where a page has its first Python
    assert len(ran) == len(blocks(page))


@of("../README.md")
def _(get, run):
    model = TransformerHost(HostSpec(n_layer=1, n_head=2, n_embd=16, block_size=16), vocab_size=23)
    batch, optimizer = torch.randint(23, (4, 16)), torch.optim.AdamW(model.parameters())
    given = {"torch": torch, "model": model, "optimizer": optimizer, "loader": [(batch, batch)]}
    [names] = run(validation_loss=lambda: 3.0, **given)
    assert names["grower"].summary()["steps"] == 1


@of("environments.md")
def _(get, run):
    """The policy that learns there is an arm: it plays the same episode of a GPT as in the environment."""
    spec, shards, tmp_path, module = (get(name) for name in ("tiny_spec", "shards", "tmp_path", "module"))
    preset, *_ = get("tiny")[1:]
    places = {"demo": preset, "tinystories-char": preset, "SHARDS": shards}
    places["RECORDING"] = recorded(tmp_path, [ended(tmp_path / "tamiyo", TamiyoPolicy(), 0, "tamiyo")[0]])
    words = {f'"{name}"': repr(str(place)) for name, place in places.items()}
    made, *_, last = run({**words, "20_000": 64, "gamma=": "n_steps=64, seed=0, gamma="})
    assert made["info"]["instance_id"] == 3

    module("my_controller", blocks("environments.md")[-1])
    [command] = blocks("environments.md", "")
    _, *line = shlex.split(command.replace("tinystories-char", preset))
    assert cli.main([*line, "--data", str(shards), "--out", "run"]) == 0
    env, ended_ = growth_env(spec, shards, {0: Instance()}), False
    seen, _ = env.reset(seed=0)
    while not ended_:
        row, _ = last["model"].predict(seen, action_masks=env.action_masks(), deterministic=True)
        seen, _, ended_, _, info = env.step(row)
    summary = summary_of(tmp_path / "run")
    assert (summary["val_loss"], summary["shape"]) == (info["val_loss"], info["summary"]["shape"])
    assert {graft["reason"].partition(" of ")[2] for graft in summary["grafts"]} == {"my_controller:arm"}


@of("recorded.md")
def _(get, run):
    get("monkeypatch").chdir(ROOT)
    [names] = run()
    assert names["unrecorded"] == 0
    table = pq.read_table((ROOT / RECORDED).with_name("runs.parquet")).to_pylist()
    tamiyo = {row["instance"]: row["val_loss"] for row in table if row["arm"] == "tamiyo"}
    best = {i: min(row["val_loss"] for row in table if row["instance"] == i) for i in tamiyo}
    assert names["regrets"] == [tamiyo[i] - best[i] for i in names["env"].instance_set]


@of("results.md")
def _(get, run):
    """The page's tables are those of the runs that are kept."""
    (get("tmp_path") / "benchmarks").symlink_to(ROOT / "benchmarks")
    printed, [names] = get("capsys"), run()
    rows = printed.readouterr().out.replace("-", "−").splitlines()
    assert len(rows) > len(names["arms"]) > 6
    assert set(rows) <= set((ROOT / "docs/results.md").read_text().replace("*", "").splitlines())


@of("sweeps.md")
def _(get, run):
    few = SyntheticSweep(statics={1: 1.4}, grown={}, seeds=(0,), tuning_seeds=())
    log(MlflowClient(get("store")), few.runs(), few.sweep())
    [names] = run()
    assert len(names["tables"].finals) == 1


@of("text.md")
def _(get, run):
    tokenizer = get("tokens").tokenizer
    host = TransformerHost(HostSpec(n_layer=1), vocab_size=tokenizer.vocab_size)
    export(host, Path("DIR"), tokenizer)
    [names] = run()
    idx = torch.tensor([names["tokenizer"].encode("the cat")])
    assert torch.equal(names["host"](idx), host.eval()(idx))


@of("your-own-arm.md")
@of("your-own-blueprint.md")
def _(get, run):
    """And `tests/pipelines/test_plugins.py` plays them."""
    run()


@of("your-own-loop.md")
def _(get, run):
    printed = get("capsys")
    torch.manual_seed(0)
    run()
    assert printed.readouterr().out.splitlines() == ["graft block at h0.stream at step 67", "2 layers"]


@of("your-own-model.md")
def _(get, run):
    """A GPT of transformers and one of nanoGPT grow, and keep their logits on the way back."""
    get("monkeypatch").setitem(sys.modules, "model", nanogpt)
    first, second, *_ = run()
    assert (first["grown"].config.n_layer, first["grown"].config.n_inner) == (2, 192)
    assert second["host"].shape.depth() == 3
    assert all(same_logits(names["host"], names["grown"]) for names in (first, second))


@torch.no_grad()
def same_logits(host, model) -> bool:
    idx = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    out = model.eval()(idx, idx) if isinstance(model, nanogpt.GPT) else model.eval()(idx)
    logits = out[0] if isinstance(out, tuple) else out.logits
    return torch.allclose(host.eval()(idx), logits, atol=1e-5)


@pytest.fixture
def page():
    """The names that the page's own host leaves."""
    return after_each(blocks("your-own-model.md")[2:])[-1]


def test_the_pages_own_host_grows_and_shrinks_as_every_host_does(page):
    host, kasmina = page["host"], page["kasmina"]
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
    host, module = page["host"], nn.Linear(3, 3)
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
