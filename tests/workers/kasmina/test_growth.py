"""Growing is safe, for every registered blueprint; pruning takes a graft out as if it had never been."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.platform.errors import UserError
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import make_blueprints
from tests.workers.kasmina.growing import (
    KINDS,
    TOLERANCE,
    assert_owned,
    batch,
    flops,
    grow,
    growths,
    logits,
    logits_in_training,
    named,
    outside,
    pick,
    resnet,
    small,
    train,
    tree,
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_grafts_are_safe(kind, data):
    host, kasmina, numbers = data.draw(growths(kind, probation_steps=5))
    optimizer, blueprints = kasmina.optimizer, kasmina.blueprints
    train(host, kasmina, 2)
    for number in numbers:
        site, name = pick(host, number)
        before, before_in_training = logits(host), logits_in_training(host)
        values = {
            place: (p, p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
            for place, p in named(host).items()
        }
        predicted = blueprints[name].resized(host.shape, site)
        twin, undone = copy.deepcopy((host, kasmina))
        undone.graft(site, name)
        undone.prune(site)
        assert torch.equal(logits(twin), before)
        assert (twin.shape.layers, tree(twin)) == (host.shape.layers, tree(host))
        for place, p in named(twin).items():
            assert all(torch.equal(undone.optimizer.state[p][key], value) for key, value in values[place][2].items())
        assert_owned(undone)

        seed = kasmina.graft(site, name)

        bound = TOLERANCE[before.dtype] * max(1.0, before.abs().max().item())
        assert (logits(host) - before).abs().max() <= bound
        assert (logits_in_training(host) - before_in_training).abs().max() <= bound
        grown = {place: p for place, p in named(host).items() if p.shape != values.get(place, [p])[0].shape}
        for place, p in named(host).items():
            if place in values:
                was, value, moments = values[place]
                assert (p is was) == (place not in grown)
                kept = tuple(slice(size) for size in value.shape)
                assert torch.equal(p[kept], value)
                for key, moment in moments.items():
                    there = optimizer.state[p][key]
                    assert torch.equal(there[kept] if there.dim() else there, moment)
                    assert there.count_nonzero() == moment.count_nonzero()  # the rest has none
        assert all(not view.any() for view in blueprints[name].outgoing(host, seed.planted))
        assert host.shape == predicted
        assert host.shape.parameters_count() == sum(p.numel() for p in host.parameters())
        inside = [p.numel() for p in host.parameters() if p not in outside(host)]
        assert host.shape.parameters_count(non_embedding=True) == sum(inside)
        assert_owned(kasmina)
        new = {n: p for n, p in named(host).items() if n not in values}
        added = [p.numel() - values[place][1].numel() for place, p in grown.items()]
        assert seed.parameters == sum(p.numel() for p in new.values()) + sum(added)
        reached = {n for n in new if ".experts." in n}  # which no token may have chosen
        for _ in range(2):
            train(host, kasmina)
            reached |= {n for n, p in new.items() if p.grad is not None and p.grad.any()}
        assert reached == new.keys()
        assert all(each.of(each.parameter.grad).any() for each, _ in kasmina.slowed()[:3] if added)  # the newest first
        train(host, kasmina)


def test_an_expert_that_is_chosen_learns():
    host, kasmina = small(n_embd=16)
    kasmina.optimizer.param_groups[0]["lr"] = 1e-4  # the toy's usual rate moves every token's score at once
    kasmina.graft("h0.ffn", "expert")
    train(host, kasmina, 2)
    assert all(p.grad.abs().max() > 0 for n, p in host.named_parameters() if ".experts." in n)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_flops_are_the_counted_ones(kind, data):
    host, kasmina, numbers = data.draw(growths(kind))
    for number in numbers:
        site, name = pick(host, number)
        if name != "expert":  # whose FLOPs depend on its gate: test_experts.py
            kasmina.graft(site, name)
    assert flops(host) * 3 == host.shape.flops_per_token() * host.spec.tokens * len(batch(host))


@pytest.mark.parametrize("make", [small, resnet, lambda: resnet(norm="batch")], ids=KINDS)
def test_a_graft_makes_no_spike(make):
    """The losses after it, on the same batch, against those of a twin that waited."""
    waited = make()
    train(*waited, 30)
    sites = waited[0].shape.injection_specs()
    for name in {name: None for site in sites for name in site.blueprints}:
        host, kasmina = copy.deepcopy(waited)
        kasmina.graft(next(site.id for site in sites if name in site.blueprints), name)
        grown, plain = train(host, kasmina, 12), train(*copy.deepcopy(waited), 12)
        assert grown[0] == pytest.approx(plain[0], abs=1e-5)
        assert max(a - b for a, b in zip(grown, plain, strict=True)) < 0.03, name


def test_a_seed_warms_up_from_above_zero():
    host, kasmina = small()
    seed = kasmina.graft("h0.ffn", "ffn")
    weights = []
    for _ in range(12):
        train(host, kasmina)
        weights.append({weight for _, weight in kasmina.slowed()})
    assert weights == [{min(1, (i + 1) / 10) ** 2} for i in range(9)] + [set()] * 3
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
    rest = {"params": others, "weight_decay": 0.0, "betas": (0.5, 0.6)}
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, rest])
    kasmina = Kasmina(host, optimizer)
    kasmina.graft("h0.stream", "block")
    for group, matrix in zip(optimizer.param_groups, (True, False), strict=True):
        assert {p.dim() > 1 for p in group["params"]} == {matrix}
    assert_owned(kasmina)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimizers_grow_too(make):
    host, _ = small()
    kasmina = Kasmina(host, make(host.parameters(), lr=1e-2), probation_steps=3)
    for site, name in (("h0.ffn", "ffn"), ("h1.attention", "attention"), ("h0.stream", "block")):
        kasmina.graft(site, name)
        train(host, kasmina, 4)
    assert_owned(kasmina)


def test_an_optimizer_whose_state_cannot_grow_is_told_of_before_anything_changes():
    host, _ = small()
    kasmina = Kasmina(host, torch.optim.Adafactor(host.parameters()))
    train(host, kasmina)
    shape = host.shape
    with pytest.raises(UserError, match="Adafactor cannot follow a graft: its 'row_var'"):
        kasmina.graft("h0.ffn", "ffn")
    assert (host.shape, kasmina.grafts) == (shape, 0)
    train(host, kasmina)


@pytest.mark.parametrize(
    ("site", "blueprint", "sentence"),
    [
        ("h9.ffn", "ffn", "cannot be grafted at 'h9.ffn'"),
        ("h0.ffn", "fnn", "'fnn' cannot be grafted"),
        ("h0.ffn", "attention", "h0.ffn takes ffn, expert"),
        ("h0.attention", "attention", "limit"),
    ],
)
def test_a_bad_graft_or_prune_changes_nothing(site, blueprint, sentence):
    host, kasmina = small(blueprints=make_blueprints({"attention": {"limit": 2}, "ffn": {}}))
    shape, groups = host.shape, len(kasmina.optimizer.param_groups)
    with pytest.raises(UserError, match=sentence):
        kasmina.graft(site, blueprint)
    with pytest.raises(UserError, match="no seed at site"):
        kasmina.prune(site)
    assert (host.shape, len(kasmina.optimizer.param_groups)) == (shape, groups)
    assert sum(p.numel() for p in host.parameters()) == shape.parameters_count()


@pytest.mark.parametrize("settings", [{"head": {}}, {"ffn": {"widht": 3}}, {"ffn": {"width": 0}}], ids=str)
def test_bad_blueprint_settings(settings):
    with pytest.raises(UserError, match=r"must be|unknown"):
        make_blueprints(settings)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_order_of_grafts_and_prunes(kind, data):
    """Pruned newest first, the host is back to the layers and tree it had."""
    host, kasmina, numbers = data.draw(growths(kind))
    start = host.shape.layers, tree(host)
    grow(host, kasmina, numbers)
    while kasmina.seeds:
        newest = kasmina.seeds[-1]
        expected = kasmina.blueprints[newest.blueprint].pruned(host.shape, newest.planted)
        before = logits(host)
        with kasmina.masked(newest.site):
            masked = logits(host)
        assert torch.equal(logits(host), before)
        kasmina.prune(newest.site)
        torch.testing.assert_close(logits(host), masked, rtol=1e-4, atol=1e-5)
        assert host.shape == expected
        assert_owned(kasmina)
        train(host, kasmina)
    assert (host.shape.layers, tree(host)) == start


def test_a_pruned_layer_takes_along_what_was_grafted_inside_it_and_its_name_is_not_used_again():
    host, kasmina = small()
    kasmina.graft("h0.stream", "block")  # h2
    kasmina.graft("h2.ffn", "ffn")
    behind = kasmina.graft("h2.stream", "block")  # h3
    outside = kasmina.graft("h1.ffn", "ffn")
    kasmina.prune("h0.stream")
    assert [block.uid for block in host.h] == [0, 3, 1]
    assert kasmina.seeds == [behind, outside]
    assert_owned(kasmina)
    train(host, kasmina, 12)
    again = kasmina.graft("h0.stream", "block")
    assert [block.uid for block in host.h] == [0, 4, 3, 1]
    assert again.number == 4
    assert_owned(kasmina)
