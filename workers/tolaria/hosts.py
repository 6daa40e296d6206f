"""The choice of the host for a spec; other kinds of hosts would be added here."""

from esper.platform.spec import RunSpec
from esper.workers.tolaria.model.shape import TransformerShape


def start_shape(spec: RunSpec, vocab_size: int) -> TransformerShape:
    """The shape that a run starts with."""
    return TransformerShape.of(spec.host, vocab_size)
