"""Pruning takes a graft out as if it had never been; masking shows what it is worth.

Alone: `pytest tests/workers/kasmina/test_prune.py`.
"""

import pytest
import torch
from growing import assert_owned, hosts, kasmina_of, logits, numbers, pick, settings_drawn, small, train
from hypothesis import given, settings

from esper.platform.errors import UserError
from esper.workers.kasmina.registry import make_blueprints


def tree(host):
    return [name for name, _ in host.named_modules()], {n: p.shape for n, p in host.named_parameters()}


@settings(max_examples=30, deadline=None)
@given(hosts(), numbers(), settings_drawn())
def test_graft_then_prune_at_once_is_nothing(host, drawn, blueprints):
    kasmina = kasmina_of(host, blueprints, probation_steps=3)
    train(host, kasmina, 2)
    for i, number in enumerate(drawn):
        site, name = pick(host, number)
        before, shape, was = logits(host), host.shape, tree(host)
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in kasmina.optimizer.state.items()}
        groups = len(kasmina.optimizer.param_groups)
        kasmina.graft(site, name)
        kasmina.prune(site)
        assert torch.equal(logits(host), before)
        assert (host.shape, tree(host)) == (shape, was)
        assert len(kasmina.optimizer.param_groups) == groups
        assert all(torch.equal(kasmina.optimizer.state[p][k], v) for p, s in state.items() for k, v in s.items())
        assert_owned(kasmina)
        if i % 2:  # and now keep it, so that later ones come onto a grown host
            kasmina.graft(site, name)
            train(host, kasmina, 2)
            kasmina.fuse(kasmina.seeds[-1]) if fusable(kasmina) else None


def fusable(kasmina):
    last = kasmina.seeds[-1]
    young = [seed for seed in kasmina.seeds if seed.site == last.site and seed.units and not seed.fused]
    return not last.units or young == [last]


@settings(max_examples=30, deadline=None)
@given(hosts(), numbers(least=2), settings_drawn())
def test_any_order_of_grafts_fuses_and_prunes(host, drawn, blueprints):
    """Pruned newest first, fused or not, the host is back to the shape and tree it had."""
    kasmina = kasmina_of(host, blueprints, probation_steps=3)
    start = host.shape, tree(host)
    for i, number in enumerate(drawn):
        kasmina.graft(*pick(host, number))
        train(host, kasmina, 2)
        if i % 2 and fusable(kasmina):
            kasmina.fuse(kasmina.seeds[-1])
    while kasmina.seeds:
        newest = kasmina.seeds[-1]
        expected = blueprints[newest.blueprint].pruned(host.shape, newest)
        with kasmina.masked(newest.site):
            masked = logits(host)
        kasmina.prune(newest.site)
        torch.testing.assert_close(logits(host), masked, rtol=1e-4, atol=1e-5)
        assert host.shape == expected
        assert_owned(kasmina)
        train(host, kasmina)
    assert (host.shape, tree(host)) == start


def test_masking_leaves_every_bit_as_it_was():
    host, kasmina = small()
    train(host, kasmina, 3)
    for site, name in (("h0.ffn", "ffn"), ("h0.stream", "block"), ("h1.ffn", "expert")):
        kasmina.graft(site, name)
        train(host, kasmina, 8)
        values = {n: p.detach().clone() for n, p in host.named_parameters()}
        before = logits(host)
        with kasmina.masked(site):
            assert not torch.equal(logits(host), before)
        assert all(torch.equal(p, values[n]) for n, p in host.named_parameters())


def test_a_pruned_layer_takes_along_what_was_grafted_inside_it_and_nothing_else():
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
    kasmina.fuse(behind)
    assert_owned(kasmina)


@pytest.mark.parametrize(
    ("site", "sentence"),
    [("h9.ffn", "unknown site"), ("h1.ffn", "no seed at site 'h1.ffn' to prune: seeds are at h0.ffn")],
)
def test_a_prune_of_nothing_changes_nothing(site, sentence):
    host, kasmina = small()
    kasmina.graft("h0.ffn", "ffn")
    shape, groups = host.shape, len(kasmina.optimizer.param_groups)
    with pytest.raises(UserError, match=sentence):
        kasmina.prune(site)
    assert host.shape == shape
    assert len(kasmina.optimizer.param_groups) == groups


def test_a_pruned_graft_makes_room_for_another():
    host, _ = small()
    kasmina = kasmina_of(host, make_blueprints({"ffn": {"width": 4, "limit": 36}}))
    first = kasmina.graft("h0.ffn", "ffn")
    with pytest.raises(UserError, match="limit"):
        kasmina.graft("h0.ffn", "ffn")
    kasmina.prune("h0.ffn")
    second = kasmina.graft("h0.ffn", "ffn")
    assert first.number != second.number
