"""From a spec's host section to a host model."""

from esper.platform.spec import RunSpec
from esper.workers.tolaria.model.shape import TransformerShape
from esper.workers.tolaria.model.transformer import TransformerConfig


def host_config(spec: RunSpec, vocab_size: int) -> TransformerConfig:
    """The configuration that the spec's host is born with."""
    values = spec.host.model_dump(exclude={"kind"})
    if values["layers"] is not None:
        values["layers"] = TransformerShape.layers_from_json(values["layers"])
    return TransformerConfig(vocab_size=vocab_size, **values)


def start_shape(spec: RunSpec, vocab_size: int) -> TransformerShape:
    """The shape that a run starts with."""
    return host_config(spec, vocab_size).shape()
