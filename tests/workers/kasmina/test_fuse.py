"""A fused host is one that was born so: bit for bit in forward, and in training but for what β₂ᵗ has left."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given

from esper.platform.errors import UserError
from esper.workers.kasmina import Kasmina
from esper.workers.tolaria.model.transformer import TransformerHost
from tests.workers.kasmina.growing import BETAS, assert_owned, growths, logits, pick, small, train


def born(host):
    """A host born in the shape that `host` has grown to."""
    spec = host.spec.model_copy(update={"n_layer": host.shape.depth(), "layers": host.shape.layers})
    return TransformerHost(spec, host.shape.vocab_size).to(host.wte.weight.dtype)


@given(growths())
def test_fusing_changes_no_bit_of_the_output(growth):
    host, kasmina, numbers = growth
    for number in numbers:
        kasmina.graft(*pick(host, number))
        train(host, kasmina, 2)
    before, count = logits(host), host.shape.parameters_count()
    for seed in list(kasmina.seeds):
        kasmina.fuse(seed)
        assert torch.equal(logits(host), before)
        assert_owned(kasmina)
    assert not host.split()
    assert host.shape.parameters_count() == count == sum(p.numel() for p in host.parameters())
    assert kasmina.host_groups == kasmina.optimizer.param_groups
    other = born(host)
    assert [name for name, _ in other.named_modules()] == [name for name, _ in host.named_modules()]
    other.load_state_dict(host.state_dict())
    assert torch.equal(logits(other), before)
    train(host, kasmina)


@pytest.mark.parametrize("age", [30, 120, 270])
def test_the_next_updates_are_those_of_the_run_that_stayed_split(age):
    """Bound: the relative difference of the next 20 updates is at most 4·β₂ᵗ, and rounding (1e-11 in float64)."""
    host, kasmina = grown(age)
    fused_host, fused = grown(age)
    (seed,) = fused.seeds
    fused.fuse(seed)
    start = whole(host)
    for _ in range(20):
        train(host, kasmina)
        train(fused_host, fused)
        difference, moved = (whole(host) - whole(fused_host)).norm(), (whole(host) - start).norm()
        assert difference / moved <= 4 * BETAS[1] ** age + 1e-11


def grown(age):
    host = small(n_layer=1)[0].double()
    kasmina = Kasmina(host, torch.optim.AdamW(host.parameters(), lr=1e-3, betas=BETAS), probation_steps=10)
    train(host, kasmina, 50)
    kasmina.graft("h0.ffn", "ffn")
    train(host, kasmina, age)
    return host, kasmina


def whole(host):
    """The grown matrices, as one vector."""
    mlp = host.h[0].mlp
    return torch.cat([tensor.detach().flatten() for linear in (mlp.c_fc, mlp.c_proj) for tensor in linear.joined()])


def test_seeds_are_fused_when_their_moments_are_old_enough():
    host, kasmina = small()
    seed = kasmina.graft("h0.ffn", "ffn")
    assert 0.95**seed.fuse_age <= 1e-6 < 0.95 ** (seed.fuse_age - 1)
    train(host, kasmina, seed.fuse_age - 1)
    assert not kasmina.due
    assert kasmina.fuse() == []
    train(host, kasmina)
    assert kasmina.due
    assert kasmina.fuse() == [seed]
    assert seed.fused
    assert not host.split()


def test_of_two_seeds_at_a_site_the_older_is_fused_first_and_none_twice():
    host, kasmina = small()
    first = kasmina.graft("h0.ffn", "ffn")
    train(host, kasmina, 4)
    second, gone = kasmina.graft("h0.ffn", "ffn"), kasmina.graft("h1.ffn", "ffn")
    kasmina.prune("h1.ffn")
    train(host, kasmina, 4)
    before = logits(host)
    for seed, ready in ((gone, False), (second, False), (first, True), (first, False), (second, True)):
        with nullcontext() if ready else pytest.raises(UserError, match="gone, fused, or younger"):
            kasmina.fuse(seed)
    assert torch.equal(logits(host), before)


def test_a_seed_inside_a_young_layer_outlives_the_layers_fusing():
    host, kasmina = small()
    layer = kasmina.graft("h0.stream", "block")
    train(host, kasmina, 5)
    inner = kasmina.graft("h2.ffn", "ffn")
    train(host, kasmina, 3)
    kasmina.fuse(layer)
    host_rate = kasmina.optimizer.param_groups[0]["lr"] = 0.5
    train(host, kasmina)
    assert {group["lr"] for group, _ in inner.groups} == {host_rate * (inner.age / 10) ** 2}
    kasmina.fuse(inner)
    assert_owned(kasmina)
    assert len(kasmina.optimizer.param_groups) == 1
