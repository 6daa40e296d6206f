"""From a spec's host section to a host's shape: where another kind of host would be chosen."""

from esper.platform.spec import RunSpec
from esper.workers.tolaria.model.shape import TransformerShape


def start_shape(spec: RunSpec, vocab_size: int) -> TransformerShape:
    """The shape that a run starts with."""
    return TransformerShape.of(spec.host, vocab_size)
