"""What the tests of growth share: small hosts, drawn by hypothesis, and a few steps of training."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.platform.spec import HostSpec
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.tolaria.model.transformer import TransformerHost

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
BETAS = (0.9, 0.95)


@st.composite
def growths(draw, probation_steps=3):
    """A host of any small shape, tied or not, in float32 or float64; its Kasmina; up to six numbers for `pick`."""
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
    host = TransformerHost(spec, draw(st.integers(5, 40)), generator).to(draw(st.sampled_from(list(TOLERANCE))))
    layer = {"init": draw(st.sampled_from(["zero", "copy"]))}
    blueprints = make_blueprints({"attention": {}, "ffn": {"width": 5}, "expert": {}, "block": layer})
    numbers = draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=6))
    return host, kasmina_of(host, blueprints, probation_steps), numbers


def small(vocab_size=11, blueprints=None, **changes):
    """A host of two layers and what grows it."""
    spec = HostSpec(**{"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8} | changes)
    host = TransformerHost(spec, vocab_size, torch.Generator().manual_seed(0))
    return host, kasmina_of(host, blueprints)


def kasmina_of(host, blueprints=None, probation_steps=10):
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2, betas=BETAS)
    return Kasmina(host, optimizer, blueprints=blueprints, probation_steps=probation_steps)


def batch(host):
    """int64 (3, block_size)."""
    size = (3, host.shape.block_size)
    return torch.randint(0, host.shape.vocab_size, size, generator=torch.Generator().manual_seed(1))


def train(host, kasmina, steps=1):
    """On one batch; returns the losses."""
    idx, losses = batch(host), []
    for _ in range(steps):
        kasmina.optimizer.zero_grad()
        loss = F.cross_entropy(host(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        loss.backward()
        kasmina.step()
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


def grow(host, kasmina, numbers):
    """Graft by each number, with training after it."""
    for number in numbers:
        kasmina.graft(*pick(host, number))
        train(host, kasmina, 2)


def flops(host):
    """Counted by torch, which knows the attention products only in their unfused form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits(host)
    return counter.get_total_flops()


def named(host):
    """The parameters by names that an inserted layer does not shift."""
    inside = {f"h{block.uid}.{name}": p for block in host.h for name, p in block.named_parameters()}
    return inside | {name: p for name, p in host.named_parameters() if not name.startswith("h.")}


def linears(host):
    return [module for module in host.modules() if isinstance(module, torch.nn.Linear)]


def tree(host):
    return [name for name, _ in host.named_modules()], {n: p.shape for n, p in host.named_parameters()}


def assert_owned(kasmina):
    """The optimizer holds exactly the host's parameters, once each, with state of their shape."""
    owned = [p for group in kasmina.optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == set(kasmina.host.parameters())
    assert all(module.weight.shape == (module.out_features, module.in_features) for module in linears(kasmina.host))
    for parameter, state in kasmina.optimizer.state.items():
        assert parameter in set(owned)
        assert all(value.shape == parameter.shape for value in state.values() if value.dim())
