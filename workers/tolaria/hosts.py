"""The choice of the host for a spec's kind; others are added here. `vocab_size`: its outputs, token ids or classes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper.platform.host_spec import Host
from esper.platform.spec import RunSpec
from esper.workers.tolaria.model.layered import Layout
from esper.workers.tolaria.model.resnet import ResNetHost, ResNetShape
from esper.workers.tolaria.model.transformer import TransformerHost, TransformerShape

HOSTS: dict[str, type[Any]] = {"transformer": TransformerHost, "resnet": ResNetHost}
AnyHost = TransformerHost | ResNetHost
AnyShape = TransformerShape | ResNetShape


def start_shape(spec: RunSpec, vocab_size: int, n_layer: int | None = None) -> AnyShape:
    """The shape that a run starts with; `n_layer` is an instance's number of layers."""
    host = spec.host.starting_with(n_layer)
    return HOSTS[host.kind].Shape.of(host, vocab_size)


def new_host(spec: Host, vocab_size: int, generator: torch.Generator | None = None) -> AnyHost:
    """A host at birth; weights are drawn from the CPU `generator`, by default the global one."""
    return HOSTS[spec.kind](spec, vocab_size, generator)


def rebuilt(spec: Host, vocab_size: int, layout: Layout, state: Mapping[str, Tensor]) -> AnyHost:
    """The host of this layout and `own_state`, not copied; an error, before allocating, where they do not fit."""
    return HOSTS[spec.kind].rebuilt(spec, vocab_size, layout, state)


def outputs_of(spec: Host, state: Mapping[str, Tensor]) -> int:
    """The number of outputs of the host that a state is of."""
    return len(state[HOSTS[spec.kind].OUTPUTS])
