"""Growing is safe, for every registered blueprint: to register one is to have it tested here.

Identity at birth, old weights and moments untouched, gradients to everything new, formulas equal to counts.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.platform.errors import UserError
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import make_blueprints, names
from esper.workers.tolaria.model.transformer import TransformerConfig, TransformerHost

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


@st.composite
def grown(draw):
    """A trained host with its optimizer, and a list of grafts drawn as they become possible."""
    head_dim = draw(st.sampled_from([2, 4, 8]))
    config = TransformerConfig(
        vocab_size=draw(st.integers(5, 40)),
        block_size=8,
        n_layer=draw(st.integers(1, 3)),
        n_head=draw(st.integers(1, 3)),
        n_embd=draw(st.sampled_from([6, 8, 12])),
        head_dim=head_dim,
        mlp_width=draw(st.integers(3, 20)),
        tied=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    host = TransformerHost(config, torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)
    return host, draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=6))


def batch(host):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, host.config.vocab_size, (3, 8), generator=generator)


def train(host, optimizer, kasmina, steps=1):
    idx = batch(host)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(host(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).backward()
        kasmina.warm_up()
        optimizer.step()


def pick(host, number):
    """A (site, blueprint) by number, over everything that is possible."""
    choices = [(site.id, name) for site in host.injection_specs() for name in site.blueprints]
    return choices[number % len(choices)]


@settings(max_examples=40, deadline=None)
@given(grown())
def test_any_grafts_are_safe(case):
    host, numbers = case
    dtype = host.wte.weight.dtype
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2)
    kasmina = Kasmina(host, optimizer, probation_steps=5)
    train(host, optimizer, kasmina, 2)
    idx = batch(host)
    for number in numbers:
        site, name = pick(host, number)
        before = host(idx).detach()
        values = {p: p.detach().clone() for p in host.parameters()}
        moments = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in values}
        predicted = kasmina.blueprints[name].resized(host.shape, site)

        kasmina.graft(site, name)

        after = host(idx).detach()
        bound = TOLERANCE[dtype] * max(1.0, before.abs().max().item())
        assert (after - before).abs().max() <= bound
        for p, value in values.items():
            assert torch.equal(p, value)
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in moments[p].items())
        assert host.shape == predicted
        assert host.parameters_count() == sum(p.numel() for p in host.parameters())
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(owned) == len(set(owned))
        assert set(owned) == set(host.parameters())
        new = {n: p for n, p in host.named_parameters() if p not in values}
        reached = dict.fromkeys(new, 0.0)
        for _ in range(2):
            train(host, optimizer, kasmina)
            for n, p in new.items():
                reached[n] = max(reached[n], p.grad.abs().max().item())
        assert min(reached.values()) > 0, reached
        train(host, optimizer, kasmina)


@settings(max_examples=15, deadline=None)
@given(grown())
def test_flops_are_the_counted_ones(case):
    host, numbers = case
    kasmina = Kasmina(host, torch.optim.AdamW(host.parameters()))
    for number in numbers:
        kasmina.graft(*pick(host, number))
    idx = batch(host)
    # Torch's counter knows the attention products only in their unfused form.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        host(idx)
    assert 3 * counter.get_total_flops() == host.flops_per_token() * idx.numel()


def test_non_embedding_parameters():
    host = TransformerHost(TransformerConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, tied=False))
    outside = host.wte.weight.numel() + host.wpe.weight.numel() + host.lm_head.weight.numel()
    assert host.parameters_count(non_embedding=True) == host.parameters_count() - outside


def test_every_registered_blueprint_has_a_site():
    host = TransformerHost(TransformerConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8))
    assert {name for site in host.injection_specs() for name in site.blueprints} == set(names())


def small():
    host = TransformerHost(TransformerConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8))
    return host, Kasmina(host, torch.optim.AdamW(host.parameters(), lr=1e-2), probation_steps=10)


def test_a_grown_host_runs_like_one_born_so():
    host, kasmina = small()
    train(host, kasmina.optimizer, kasmina, 3)
    kasmina.graft("h0.attention", "attention")
    kasmina.graft("h1.ffn", "ffn")
    train(host, kasmina.optimizer, kasmina, 3)
    born = TransformerHost(
        TransformerConfig(
            vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, head_dim=4, heads=(3, 2), widths=(32, 96)
        )
    )
    assert born.shape.parameters_count() == host.parameters_count()
    joined = {}
    for name, tensor in host.state_dict().items():
        stem, _, index = name.rpartition(".")
        if index.isdigit():
            axis = 1 if "c_proj.weight" in name else 0
            joined[f"{stem}.0"] = torch.cat([joined[f"{stem}.0"], tensor], axis) if f"{stem}.0" in joined else tensor
        else:
            joined[name] = tensor
    born.load_state_dict(joined)
    assert torch.equal(born(batch(host)), host(batch(host)))


def test_a_seed_warms_up_from_above_zero():
    host, kasmina = small()
    kasmina.graft("h0.ffn", "ffn")
    rates = []
    for _ in range(12):
        train(host, kasmina.optimizer, kasmina)
        rates.append(kasmina.optimizer.param_groups[-1]["lr"])
    assert rates == pytest.approx([1e-2 * min(1, (i + 1) / 10) ** 2 for i in range(12)])
    assert not kasmina.on_probation(kasmina.seeds[0])


def test_a_seed_takes_the_settings_of_its_siblings_group():
    host = TransformerHost(TransformerConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8))
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


def test_site_ids_outlive_growth_around_them():
    host, kasmina = small()
    old = {site.id for site in host.injection_specs()}
    kasmina.graft("h0.stream", "block")
    sites = host.injection_specs()
    assert old < {site.id for site in sites}
    assert [site.id for site in sites][3:5] == ["h2.attention", "h2.ffn"]
    assert [site.depth for site in sites] == sorted(site.depth for site in sites)


@pytest.mark.parametrize(
    ("site", "blueprint", "sentence"),
    [
        ("h9.ffn", "ffn", "unknown site"),
        ("h0.ffn", "fnn", "Did you mean 'ffn'"),
        ("h0.ffn", "attention", "does not fit site"),
        ("h0.attention", "attention", "limit"),
    ],
)
def test_a_bad_graft_changes_nothing(site, blueprint, sentence):
    host, _ = small()
    optimizer = torch.optim.AdamW(host.parameters())
    kasmina = Kasmina(host, optimizer, blueprints=make_blueprints({"attention": {"limit": 2}, "ffn": {}}))
    shape, groups = host.shape, len(optimizer.param_groups)
    with pytest.raises(UserError, match=sentence):
        kasmina.graft(site, blueprint)
    assert host.shape == shape
    assert len(optimizer.param_groups) == groups
    assert sum(p.numel() for p in host.parameters()) == shape.parameters_count()


def test_an_optimizer_of_another_host_is_refused():
    host, other = small()[0], small()[0]
    with pytest.raises(UserError, match="does not hold exactly"):
        Kasmina(host, torch.optim.AdamW(other.parameters()))


@pytest.mark.parametrize("settings", [{"head": {}}, {"ffn": {"widht": 3}}, {"ffn": {"width": 0}}])
def test_bad_blueprint_settings(settings):
    with pytest.raises(UserError):
        make_blueprints(settings)


@pytest.mark.parametrize(
    "change",
    [{"n_embd": 9}, {"n_layer": 0}, {"heads": (1,)}, {"widths": (3, 0)}],
    ids=lambda change: next(iter(change)),
)
def test_a_shape_that_cannot_be(change):
    with pytest.raises(ValueError, match=r"must be|does not divide"):
        TransformerConfig(**{"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8, **change})
