"""Growing is safe, for every registered blueprint: to register one is to have it tested here.

Identity at birth, old weights and moments untouched, gradients to everything new, formulas equal to counts.
"""

import math

import pytest
import torch
from hypothesis import given
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.platform.errors import UserError
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.tolaria.model.transformer import Layout, TransformerHost
from tests.workers.kasmina.growing import (
    TOLERANCE,
    assert_owned,
    fusable,
    hosts,
    kasmina_of,
    logits,
    numbers,
    pick,
    settings_drawn,
    small,
    train,
    tree,
)


@given(hosts(), numbers(), settings_drawn())
def test_any_grafts_are_safe(host, drawn, blueprints):
    dtype = host.wte.weight.dtype
    kasmina = kasmina_of(host, blueprints, probation_steps=5)
    optimizer = kasmina.optimizer
    train(host, kasmina, 2)
    for number in drawn:
        site, name = pick(host, number)
        before = logits(host)
        values = {p: p.detach().clone() for p in host.parameters()}
        moments = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in values}
        predicted = blueprints[name].resized(host.shape, site)

        seed = kasmina.graft(site, name)

        bound = TOLERANCE[dtype] * max(1.0, before.abs().max().item())
        assert (logits(host) - before).abs().max() <= bound
        for p, value in values.items():
            assert torch.equal(p, value)
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in moments[p].items())
        assert all(not view.any() for view in blueprints[name].outgoing(host, seed.planted))
        assert host.shape == predicted
        assert host.shape.parameters_count() == sum(p.numel() for p in host.parameters())
        assert_owned(kasmina)
        new = {n: p for n, p in host.named_parameters() if p not in values}
        assert seed.parameters == sum(p.numel() for p in new.values())
        reached = dict.fromkeys(new, 0.0)
        for _ in range(2):
            train(host, kasmina)
            for n, p in new.items():
                if p.grad is not None:
                    reached[n] = max(reached[n], p.grad.abs().max().item())
        # Exempt: an expert that no token chose (its gate is sparse, the batch small).
        missed = {n for n, value in reached.items() if not value and ".experts." not in n}
        assert not missed
        train(host, kasmina)


@given(hosts(), numbers(), settings_drawn())
def test_a_grown_host_is_rebuilt_from_its_layout(host, drawn, blueprints):
    """Fused or not: the same tree, and the same logits to the bit."""
    kasmina = kasmina_of(host, blueprints, probation_steps=3)
    for i, number in enumerate(drawn):
        seed = kasmina.graft(*pick(host, number))
        train(host, kasmina, 2)
        if i % 2 and fusable(kasmina, seed):
            kasmina.fuse(seed)
    layout = Layout.model_validate_json(host.layout().model_dump_json())
    rebuilt = TransformerHost.rebuilt(host.spec, host.shape.vocab_size, layout, host.own_state())
    assert tree(rebuilt) == tree(host)
    assert rebuilt.shape == host.shape
    assert torch.equal(logits(rebuilt), logits(host))


def test_an_expert_that_is_chosen_learns():
    host, kasmina = small(n_embd=16)
    kasmina.optimizer.param_groups[0]["lr"] = 1e-4  # the toy's usual rate moves every token's score at once
    kasmina.graft("h0.ffn", "expert")
    train(host, kasmina, 2)
    assert all(p.grad.abs().max() > 0 for n, p in host.named_parameters() if ".experts." in n)


@given(hosts(), numbers())
def test_flops_are_the_counted_ones(host, drawn):
    blueprints = make_blueprints({"attention": {}, "ffn": {}, "block": {}})
    kasmina = kasmina_of(host, blueprints)
    for number in drawn:
        site, name = pick(host, number)
        if name in blueprints:  # an expert's depend on its gate: test_experts.py
            kasmina.graft(site, name)
    # Torch's counter knows the attention products only in their unfused form.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits(host)
    assert 3 * counter.get_total_flops() == host.shape.flops_per_token() * 3 * host.shape.block_size


def test_non_embedding_parameters():
    host, _ = small(tied=False)
    outside = host.wte.weight.numel() + host.wpe.weight.numel() + host.lm_head.weight.numel()
    assert host.shape.parameters_count(non_embedding=True) == host.shape.parameters_count() - outside


def test_a_seed_warms_up_from_above_zero():
    host, kasmina = small()
    seed = kasmina.graft("h0.ffn", "ffn")
    assert len(repr(seed)) < 200  # no weights
    rates = []
    for _ in range(12):
        train(host, kasmina)
        rates.append(kasmina.optimizer.param_groups[-1]["lr"])
    assert rates == pytest.approx([1e-2 * min(1, (i + 1) / 10) ** 2 for i in range(12)])
    assert not seed.on_probation


def test_a_layer_in_a_small_stream_warms_up_longer():
    """After the embeddings, and after a layer that was put in there: it adds next to nothing at first."""
    host, kasmina = small()
    with torch.no_grad():
        host.h[0].mlp.c_proj.bias.fill_(10.0)
        host.h[1].mlp.c_proj.bias.fill_(2.0)
    host.train()
    sites = ("wte.stream", "h2.stream", "h0.stream", "h1.stream")
    assert [kasmina.graft(site, "block").probation for site in sites] == [40, 40, 20, 10]
    assert host.training


def test_a_seed_takes_the_settings_of_its_siblings_group():
    host = small(n_layer=1)[0]
    matrices = [p for p in host.parameters() if p.dim() > 1]
    others = [p for p in host.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0, "betas": (0.5, 0.6)}]
    )
    kasmina = Kasmina(host, optimizer)
    kasmina.graft("h0.stream", "block")
    decays = {(group["weight_decay"], group["betas"]) for group in optimizer.param_groups[2:]}
    assert decays == {(0.3, (0.9, 0.999)), (0.0, (0.5, 0.6))}
    for group in optimizer.param_groups[2:]:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.3}


@pytest.mark.parametrize(
    ("site", "blueprint", "sentence"),
    [
        ("h9.ffn", "ffn", "cannot be grafted at 'h9.ffn'"),
        ("h0.ffn", "fnn", "'fnn' cannot be grafted"),
        ("h0.ffn", "attention", "h0.ffn takes expert, ffn"),
        ("h0.attention", "attention", "limit"),
    ],
)
def test_a_bad_graft_changes_nothing(site, blueprint, sentence):
    host, _ = small()
    kasmina = kasmina_of(host, make_blueprints({"attention": {"limit": 2}, "ffn": {}}))
    shape, groups = host.shape, len(kasmina.optimizer.param_groups)
    with pytest.raises(UserError, match=sentence):
        kasmina.graft(site, blueprint)
    assert (host.shape, len(kasmina.optimizer.param_groups)) == (shape, groups)
    assert sum(p.numel() for p in host.parameters()) == shape.parameters_count()


@pytest.mark.parametrize("settings", [{"head": {}}, {"ffn": {"widht": 3}}, {"ffn": {"width": 0}}], ids=str)
def test_bad_blueprint_settings(settings):
    with pytest.raises(UserError, match=r"must be|unknown"):
        make_blueprints(settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda layout, state: layout | {"next_uid": 1},
        lambda layout, state: layout | {"layers": layout["layers"][:1]},
        lambda layout, state: layout | {"young": {"h.7.mlp.c_fc": [4]}},
        lambda layout, state: layout | {"young": {"h.0.mlp.c_fc": [10**12]}},
        lambda layout, state: state.pop("wpe.weight") is None or layout,
        lambda layout, state: state.update({"ln_f.bias": torch.full((9,), math.nan)}) or layout,
    ],
)
def test_a_layout_of_other_tensors_is_refused(change):
    host, kasmina = small()
    kasmina.graft("h0.ffn", "ffn")
    state = host.own_state()
    layout = Layout.checked(change(host.layout().model_dump(mode="json"), state), "the layout")
    with pytest.raises((LookupError, ValueError, RuntimeError)):
        TransformerHost.rebuilt(host.spec, host.shape.vocab_size, layout, state)


def test_a_layout_beyond_all_bounds_is_refused_before_it_is_built():
    layers = [{"uid": 0, "heads": 10**9, "width": 10**12}] * 2
    with pytest.raises(UserError, match=r"layers\.0\.heads is 1000000000: input should be less than or equal to"):
        Layout.checked(small()[0].layout().model_dump(mode="json") | {"layers": layers}, "the layout")
