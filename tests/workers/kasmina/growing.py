"""What the tests of growth share: small hosts, drawn by hypothesis, and a few steps of training."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.platform.host_spec import HostSpec, ResNetSpec
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.tolaria.hosts import new_host
from esper.workers.tolaria.model.resnet import ResNetHost
from esper.workers.tolaria.model.transformer import TransformerHost

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
BETAS = (0.9, 0.95)


KINDS = ("transformer", "resnet, GroupNorm", "resnet, BatchNorm")
CONVOLUTIONS = {"conv_width": {"width": 4}, "conv_block": {}, "channel_attention": {"width": 3}}


@st.composite
def growths(draw, kind, probation_steps=3):
    """A host of any small shape, in float32 or float64; its Kasmina; up to six numbers for `pick`."""
    make = transformers if kind == "transformer" else resnets
    spec, blueprints = draw(make(kind))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    host = new_host(spec, draw(st.integers(5, 40)), generator).to(draw(st.sampled_from(list(TOLERANCE))))
    numbers = draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=6))
    return host, kasmina_of(host, make_blueprints(blueprints), probation_steps), numbers


@st.composite
def transformers(draw, kind):
    """Tied or not."""
    spec = HostSpec(
        block_size=8,
        n_layer=draw(st.integers(1, 3)),
        n_head=draw(st.integers(1, 3)),
        n_embd=draw(st.sampled_from([6, 8, 12])),
        head_dim=draw(st.sampled_from([2, 4, 8])),
        mlp_width=draw(st.integers(3, 20)),
        tied=draw(st.booleans()),
    )
    layer = {"init": draw(st.sampled_from(["zero", "copy"]))}
    return spec, {"attention": {}, "ffn": {"width": 5}, "expert": {}, "block": layer}


@st.composite
def resnets(draw, kind):
    """Of one, two or three stages with blocks."""
    spec = ResNetSpec(
        n_layer=draw(st.integers(1, 4)),
        channels=draw(st.sampled_from([4, 8])),
        width=draw(st.sampled_from([4, 8, 12])),
        group=4,
        image_size=draw(st.sampled_from([8, 11])),
        image_channels=draw(st.sampled_from([1, 3])),
        norm="batch" if kind.endswith("BatchNorm") else "group",
    )
    return spec, CONVOLUTIONS


def resnet(**changes):
    """A ResNet of two blocks and what grows it."""
    values = {"n_layer": 2, "channels": 8, "group": 4, "image_size": 8, "image_channels": 1}
    host = ResNetHost(ResNetSpec(**values | changes), 10, torch.Generator().manual_seed(0))
    return host, kasmina_of(host, make_blueprints(CONVOLUTIONS))


def small(vocab_size=11, blueprints=None, **changes):
    """A host of two layers and what grows it."""
    spec = HostSpec(**{"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8} | changes)
    host = TransformerHost(spec, vocab_size, torch.Generator().manual_seed(0))
    return host, kasmina_of(host, blueprints)


def kasmina_of(host, blueprints=None, probation_steps=10):
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2, betas=BETAS)
    return Kasmina(host, optimizer, blueprints=blueprints, probation_steps=probation_steps)


def batch(host):
    """Token ids, int64 (3, block_size), or images, (6, channels, size, size)."""
    generator, spec = torch.Generator().manual_seed(1), host.spec
    if spec.takes == "text":
        return torch.randint(0, outputs(host), (3, spec.block_size), generator=generator)
    images = torch.randn(6, spec.image_channels, spec.image_size, spec.image_size, generator=generator)
    return images.to(next(host.parameters()))


def outputs(host):
    return len(host.get_parameter(host.OUTPUTS))


def loss_of(host):
    """On one batch."""
    inputs = batch(host)
    if host.spec.takes == "text":
        return F.cross_entropy(host(inputs[:, :-1]).flatten(0, 1), inputs[:, 1:].flatten())
    targets = torch.randint(0, outputs(host), inputs.shape[:1], generator=torch.Generator().manual_seed(2))
    return F.cross_entropy(host(inputs), targets)


def train(host, kasmina, steps=1):
    """On one batch; returns the losses."""
    losses = []
    for _ in range(steps):
        kasmina.optimizer.zero_grad()
        loss = loss_of(host)
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


def logits_in_training(host):
    """On a copy, whose running statistics may change."""
    with torch.no_grad():
        return copy.deepcopy(host)(batch(host))


def pick(host, number):
    """A (site, blueprint) by number, over everything that is possible."""
    shape, blueprints = host.shape, make_blueprints()
    choices = [(site.id, name) for site in shape.injection_specs() for name in site.blueprints]
    choices = [(site, name) for site, name in choices if blueprints[name].allowed(shape, site)]
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


def outside(host):
    """Embeddings, or the stem, and the output head."""
    names = {"wte", "wpe", "lm_head", "stem", "head"}
    return {p for name, module in host.named_children() if name in names for p in module.parameters()}


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
    convolutions = [module for module in kasmina.host.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(module.weight.shape[:2] == (module.out_channels, module.in_channels) for module in convolutions)
    for parameter, state in kasmina.optimizer.state.items():
        assert parameter in set(owned)
        assert all(value.shape == parameter.shape for value in state.values() if value.dim())
