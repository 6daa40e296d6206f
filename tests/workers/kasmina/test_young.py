"""A grown host is one that was born so, and a young seed moves as if its tensors and their optimizer were its own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.slices import Slice
from esper.workers.tolaria.hosts import new_host
from tests.workers.kasmina.growing import (
    BETAS,
    KINDS,
    grow,
    growths,
    logits,
    loss_of,
    named,
    outputs,
    pick,
    small,
    train,
    tree,
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_grown_host_is_one_that_was_born_so(kind, data):
    host, kasmina, numbers = data.draw(growths(kind))
    grow(host, kasmina, numbers)
    spec = host.spec.model_copy(update={"n_layer": host.shape.depth(), "layers": host.shape.layers})
    born = new_host(spec, outputs(host)).to(logits(host).dtype)
    assert tree(born) == tree(host)
    born.load_state_dict(host.state_dict())
    assert torch.equal(logits(born), logits(host))


def prefix(part):
    """Of the names in `named` of a part's parameters."""
    return part.replace(".e", ".experts.e").replace(".gate", ".inside.gate")


class Apart:
    """Every seed's slices as parameters of their own, each with an AdamW of its own, fed with the host's gradients."""

    def __init__(self, host, kasmina):
        self.host, self.kasmina = host, kasmina
        self.pieces = []  # (name, slice, seed, parameter, optimizer)
        self.add(None, {name: Slice(None) for name in named(host)})

    def add(self, seed, slices):
        there = named(self.host)
        for name, each in slices.items():
            own = torch.nn.Parameter(each.of(there[name]).detach().clone())
            optimizer = torch.optim.AdamW([own], lr=0.0, betas=BETAS, eps=1e-30, weight_decay=0.0)
            self.pieces.append((name, each, seed, own, optimizer))

    def graft(self, site, blueprint):
        before = {name: p.shape for name, p in named(self.host).items()}
        seed = self.kasmina.graft(site, blueprint)
        new = {}
        for name, p in named(self.host).items():
            if name not in before:
                new[name] = Slice(None)
            elif p.shape != before[name]:
                axis = next(i for i, n in enumerate(before[name]) if n != p.shape[i])
                new[name] = Slice(None, axis, before[name][axis], p.shape[axis] - before[name][axis])
        for i, (name, each, owner, own, optimizer) in enumerate(self.pieces):
            if each.size is None and name in new:  # of the host: it is no longer the whole
                axis = new[name].axis
                self.pieces[i] = name, Slice(None, axis, 0, new[name].start), owner, own, optimizer
        self.add(seed, new)

    def seeds(self, name, seed):
        """The seeds that a piece belongs to: its own, then those whose part it lies in, the innermost first."""
        parts = [(s, prefix(s.planted.part)) for s in reversed(self.kasmina.seeds) if s is not seed]
        inside = [s for s, part in parts if part and name.startswith(f"{part}.")]
        return [*([seed] if seed else []), *inside]

    def step(self, rate, max_norm):
        there, groups = named(self.host), {}
        for name, each, seed, own, optimizer in self.pieces:
            own.grad = None if there[name].grad is None else each.of(there[name].grad).clone()
            seeds = self.seeds(name, seed)
            groups.setdefault(next((s for s in seeds if s.on_probation), None), []).append(own)
            optimizer.param_groups[0]["lr"] = rate * math.prod(s.scale(s.age + 1) for s in seeds)
        for group in groups.values():
            torch.nn.utils.clip_grad_norm_(group, max_norm)
        for *_, optimizer in self.pieces:
            optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(data=st.data(), max_norm=st.sampled_from([0.05, 1e9]))
def test_a_young_seed_moves_as_if_it_were_apart(kind, data, max_norm):
    """Clipped by itself, at its own rate, with moments and a step count of its own; nested seeds too."""
    host, kasmina, numbers = data.draw(growths(kind, probation_steps=4))
    host.double()
    kasmina.optimizer.param_groups[0].update(weight_decay=0.0, eps=1e-30)
    apart = Apart(host, kasmina)
    for number in [None, *numbers]:
        if number is not None:
            apart.graft(*pick(host, number))
        for _ in range(3):
            kasmina.optimizer.zero_grad()
            loss_of(host).backward()
            apart.step(kasmina.optimizer.param_groups[0]["lr"], max_norm)
            kasmina.step(max_norm)
            for name, each, _, own, _ in apart.pieces:
                torch.testing.assert_close(each.of(named(host)[name]).detach(), own.detach(), rtol=1e-6, atol=1e-7)


def test_a_seed_settles_when_its_moments_are_old_enough():
    host, kasmina = small()
    train(host, kasmina, 2)
    seed = kasmina.graft("h0.ffn", "ffn")
    assert 0.95**seed.settled <= 1e-6 < 0.95 ** (seed.settled - 1)
    train(host, kasmina, seed.settled - 1)
    assert [weight for _, weight in kasmina.slowed()] == pytest.approx([1] * 3, abs=1e-6)
    train(host, kasmina)
    assert kasmina.slowed() == []


def test_a_slice_is_corrected_by_the_betas_of_its_own_group():
    host, _ = small()
    betas = {2: (0.9, 0.95), 1: (0.5, 0.6)}  # of matrices, of vectors
    groups = [{"params": [p for p in host.parameters() if p.dim() == dim], "betas": betas[dim]} for dim in betas]
    kasmina = Kasmina(host, torch.optim.AdamW(groups))
    train(host, kasmina, 2)
    seed = kasmina.graft("h0.ffn", "ffn")
    train(host, kasmina)
    weights = {each.parameter.dim(): weight for each, weight in kasmina.slowed()}
    assert weights == {dim: seed.weight(own) for dim, own in betas.items()}
    assert weights[1] != weights[2]


def test_unused_parameters_are_left_alone():
    """As the experts that no token chose: no gradient, no norm, no step."""
    host, kasmina = small()
    unused = torch.nn.Parameter(torch.ones(2))
    host.register_parameter("unused", unused)
    kasmina.optimizer.add_param_group({"params": [unused]})
    train(host, kasmina, 2)
    assert unused.tolist() == [1, 1]
