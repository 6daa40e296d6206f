"""Adding units (heads, neurons) between two linear layers: rows of the incoming one, columns of the outgoing one.

    y = V·φ(U·x)   →   y' = [V 0]·φ([U; U⁺]·x) = V·φ(U·x) + 0·φ(U⁺·x) = y

for any φ that acts on each unit alone (GELU on a neuron, attention on a head). The outgoing side is zero and the
incoming side is not: zero on both would leave both without a gradient (Net2Net 1511.05641; GradMax 2201.05125, which
also starts from zero on one side).
"""

import torch
from torch import Tensor

from esper.platform.contracts import HostProtocol, HostShape


def units_at(shape: HostShape, site_id: str) -> int:
    """Units (heads, neurons) at a site."""
    return next(site.units for site in shape.injection_specs() if site.id == site_id)


def add_units(host: HostProtocol, site_id: str, units: int, generator: torch.Generator) -> list[tuple]:
    """Add `units` units at a site; returns each new parameter with its sibling.

    New rows are drawn as wide as the site's own rows are now, so that the new units' activations are of the host's
    scale whenever the graft comes.
    """
    incoming, outgoing = host.linears(site_id)
    now = units_at(host.shape, site_id)
    rows, columns = incoming.out_features // now, outgoing.in_features // now  # of one unit
    weight = drawn_like(incoming.weight[0], (units * rows, incoming.in_features), generator)
    bias = torch.zeros(units * rows)
    return incoming.add_rows(weight, bias) + outgoing.add_columns(torch.zeros(outgoing.out_features, units * columns))


def drawn_like(sibling: Tensor, size: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values with the root mean square of `sibling`, on the CPU."""
    return torch.randn(size, generator=generator) * sibling.detach().float().square().mean().sqrt().cpu()
