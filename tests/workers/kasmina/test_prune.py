"""Pruning takes a graft out as if it had never been, but for its names; masking shows what it is worth."""

import torch
from hypothesis import given

from tests.workers.kasmina.growing import assert_owned, grow, growths, logits, named, pick, small, train, tree


@given(growths())
def test_graft_then_prune_at_once_is_nothing(growth):
    host, kasmina, numbers = growth
    train(host, kasmina, 2)
    for i, number in enumerate(numbers):
        site, name = pick(host, number)
        before, layers, was = logits(host), host.shape.layers, tree(host)
        state = {place: dict(kasmina.optimizer.state[p]) for place, p in named(host).items()}
        kasmina.graft(site, name)
        kasmina.prune(site)
        assert torch.equal(logits(host), before)
        assert (host.shape.layers, tree(host)) == (layers, was)
        now = named(host)
        assert all(torch.equal(kasmina.optimizer.state[now[n]][k], v) for n, s in state.items() for k, v in s.items())
        assert_owned(kasmina)
        if i % 2:  # and now keep it, so that later ones come onto a grown host
            kasmina.graft(site, name)
            train(host, kasmina, 2)


@given(growths())
def test_any_order_of_grafts_and_prunes(growth):
    """Pruned newest first, the host is back to the layers and tree it had."""
    host, kasmina, numbers = growth
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
