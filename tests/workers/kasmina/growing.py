"""What the tests of growth share: small hosts, drawn by hypothesis, and a few steps of training."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from esper.platform.spec import HostSpec
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.tolaria.model.transformer import TransformerHost

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
BETAS = (0.9, 0.95)


@st.composite
def hosts(draw):
    """A host of any small shape, tied or not, in float32 or float64."""
    spec = HostSpec(
        block_size=8,
        n_layer=draw(st.integers(1, 3)),
        n_head=draw(st.integers(1, 3)),
        n_embd=draw(st.sampled_from([6, 8, 12])),
        head_dim=draw(st.sampled_from([2, 4, 8])),
        mlp_width=draw(st.integers(3, 20)),
        tied=draw(st.booleans()),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    host = TransformerHost(spec, draw(st.integers(5, 40)), generator)
    return host.to(draw(st.sampled_from(list(TOLERANCE))))


def numbers(least=1):
    """Up to six numbers, each to become an action by `pick`."""
    return st.lists(st.integers(0, 10_000), min_size=least, max_size=6)


def settings_drawn():
    """Every registered blueprint, the layer with either init."""
    return st.sampled_from(["zero", "copy"]).map(
        lambda init: make_blueprints({"attention": {}, "ffn": {"width": 5}, "expert": {}, "block": {"init": init}})
    )


def small(vocab_size=11, **changes):
    """A host of two layers and what grows it."""
    spec = HostSpec(**{"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8} | changes)
    host = TransformerHost(spec, vocab_size, torch.Generator().manual_seed(0))
    return host, kasmina_of(host)


def kasmina_of(host, blueprints=None, probation_steps=10):
    """With AdamW on the host's parameters."""
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2, betas=BETAS)
    return Kasmina(host, optimizer, blueprints=blueprints, probation_steps=probation_steps)


def batch(host, n=3):
    """int64 (n, 8)."""
    return torch.randint(0, host.shape.vocab_size, (n, 8), generator=torch.Generator().manual_seed(1))


def train(host, kasmina, steps=1):
    """On one batch; returns the losses."""
    idx, losses = batch(host), []
    for _ in range(steps):
        kasmina.optimizer.zero_grad()
        loss = F.cross_entropy(host(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        loss.backward()
        kasmina.warm_up()
        kasmina.optimizer.step()
        losses.append(loss.item())
    return losses


def logits(host):
    """In evaluation mode: what an expert's capacity cuts off in training is no part of identity."""
    host.eval()
    with torch.no_grad():
        values = host(batch(host))
    host.train()
    return values


def pick(host, number):
    """A (site, blueprint) by number, over everything that is possible."""
    choices = [(site.id, name) for site in host.shape.injection_specs() for name in site.blueprints]
    return choices[number % len(choices)]


def fusable(kasmina, seed):
    """Whether no older young seed of units at its site comes first."""
    young = [other for other in kasmina.seeds if other.site == seed.site and other.planted.units and not other.fused]
    return bool(seed.planted.part) or young == [seed]


def tree(host):
    """Names of modules; names and shapes of parameters."""
    return [name for name, _ in host.named_modules()], {n: p.shape for n, p in host.named_parameters()}


def assert_owned(kasmina):
    """The optimizer holds exactly the host's parameters, once each, with state of their shape."""
    owned = [p for group in kasmina.optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == set(kasmina.host.parameters())
    for parameter, state in kasmina.optimizer.state.items():
        assert parameter in set(owned)
        assert all(value.shape == parameter.shape for value in state.values() if value.dim())
