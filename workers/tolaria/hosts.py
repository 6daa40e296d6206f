"""The choice of the host for a spec; other kinds of hosts would be added here."""

from esper.platform.spec import RunSpec
from esper.workers.tolaria.model.shape import TransformerShape


def start_shape(spec: RunSpec, vocab_size: int, n_layer: int | None = None) -> TransformerShape:
    """The shape that a run starts with; `n_layer` is an instance's number of layers."""
    return TransformerShape.of(spec.host.starting_with(n_layer), vocab_size)
