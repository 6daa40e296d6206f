"""A training step of a host that has grown, against one born that shape: while its six seeds are young, and after."""

import copy
from collections.abc import Iterator

from measuring import RATE, Row, in_turns, text, times, trainer
from step import SHAPES

from esper.platform.host_spec import HostSpec
from esper.platform.spec import RunSpec
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.model.transformer import TransformerHost
from esper.workers.tolaria.trainer import Trainer

GRAFTS = (("h0.ffn", "ffn"), ("h0.attention", "attention"), ("h0.stream", "block")) * 2
FOR_EVER = 10**9  # steps of probation


def contenders(spec: RunSpec, data: TokenData) -> dict[str, Trainer]:
    """Three hosts of one shape: born so, grown with its seeds on probation, grown with its seeds settled."""
    growth = spec.growth.model_copy(update={"probation_steps": FOR_EVER, "max_layers": spec.host.n_layer + 2})
    young, born = (trainer(spec.model_copy(update={"growth": growth}), data) for _ in range(2))
    for site, blueprint in GRAFTS:
        young.kasmina.graft(site, blueprint)
    settled = copy.deepcopy(young)
    for seed in settled.kasmina.seeds:
        seed.probation = seed.settled = 1
    settled.step(RATE)
    shape = young.host.shape
    assert isinstance(spec.host, HostSpec)
    host = spec.host.model_copy(update={"n_layer": shape.depth(), "layers": shape.layers})
    born.take(TransformerHost(host, shape.vocab_size))
    return {"born": born, "on probation": young, "settled": settled}


def rows(spec: RunSpec, steps: int, what: str) -> Iterator[Row]:
    """Of a spec: a row a stage."""
    trainers = contenders(spec, text(spec))
    seconds = in_turns({stage: lambda each=each: each.step(RATE) for stage, each in trainers.items()}, steps)
    for stage, goal in (("on probation", "≤ 1.05 ×"), ("settled", "≤ 1.02 ×")):
        told = f"step with {len(GRAFTS)} seeds {stage} against born that shape{what}"
        yield told, goal, times(seconds[stage], seconds["born"])


def measure() -> list[Row]:
    """Rows: a shape and stage each."""
    return [row for name, (steps, spec) in list(SHAPES.items())[:2] for row in rows(spec, steps, f": {name}")]
