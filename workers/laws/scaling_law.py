"""The scaling law of a surrogate's loss, with constants drawn per episode.

    L(N, D) = E + A·(N/N₀)^(−α) + B·(D/D₀)^(−β)        (Hoffmann et al. 2022, 2203.15556, eq. 2)

N effective parameters (N₀: one layer of the born shape), D effective tokens (D₀: its tokens in the spec's budget), so A
and B are nats. The state is L: D is what the current size would have needed for it, so grafts keep L continuous.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from esper.platform.errors import UserError
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.workers.observe import batch_tokens
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.model.shape import TransformerShape

VOCABULARY = 96
CONTINUOUS = ("parameter_seconds", "seconds", "flops")  # axes on which a surrogate trains parts of a step

Array = Any  # a float or a float64 array


class Size(NamedTuple):
    """A shape's totals over its layers, or several shapes' as arrays."""

    attention: Array  # parameters of attention's matrices
    other: Array  # all others, embeddings left out
    layers: Array

    @classmethod
    def of(cls, shape: TransformerShape) -> Self:
        """The size of a shape."""
        attention = sum(4 * shape.n_embd * layer.heads * shape.head_dim for layer in shape.layers)
        return cls(attention, shape.parameters_count(non_embedding=True) - attention, shape.depth())

    @classmethod
    def of_all(cls, shapes: Iterable[TransformerShape]) -> Self:
        """The sizes of shapes, as arrays."""
        return cls(*np.array([cls.of(shape) for shape in shapes], float).T)


@dataclass(frozen=True)
class ScalingLaw:
    """The constants of an episode."""

    floor: Array  # E, nats
    size: Array  # A, nats
    size_exponent: Array  # α
    data: Array  # B, nats
    data_exponent: Array  # β
    heads: Array  # how much an attention parameter counts
    width: Array  # how much any other counts
    layer: Array  # how much a layer counts beside its parameters
    reference: Array  # N₀
    tokens: Array  # D₀

    @classmethod
    def drawn(cls, seed: int, spec: RunSpec) -> Self:
        """Draw a seed's law from `spec.laws`; UserError where E + A may reach ln V."""
        laws, random, start = spec.laws, stream(seed, "law"), math.log(VOCABULARY)
        if (highest := laws.floor[1] + laws.size[1]) >= start:
            raise UserError(
                f"laws.floor and laws.size reach {highest:.2f} nats together, but a surrogate starts at "
                f"ln {VOCABULARY} = {start:.2f}: set their upper ends lower."
            )

        drawn = {}  # the floor is drawn last, so its range does not change the others
        for name in ("heads", "width", "layer", "size", "size_exponent", "data", "data_exponent", "floor"):
            low, high = getattr(laws, name)
            if name in ("heads", "width", "layer", "data"):
                drawn[name] = math.exp(random.uniform(math.log(low), math.log(high)))
            else:
                drawn[name] = float(random.uniform(low, high))
        size = Size.of(one := start_of(spec, 1))
        drawn["layer"] *= size.attention + size.other
        reference = drawn["heads"] * size.attention + drawn["width"] * size.other + drawn["layer"]
        return cls(**drawn, reference=reference, tokens=budget_tokens(spec, one))

    def size_loss(self, size: Size) -> Array:
        """E + A·(N/N₀)^(−α), nats: the loss at infinite tokens; every growth lowers it."""
        effective = self.heads * size.attention + self.width * size.other + self.layer * size.layers
        return self.floor + self.size * (effective / self.reference) ** -self.size_exponent

    def trained(self, loss: Array, size_loss: Array, tokens: Array) -> Array:
        """The loss after `tokens` more at a size, monotone in `loss`, which must exceed `size_loss`."""
        have = ((loss - size_loss) / self.data) ** (-1 / self.data_exponent)
        return size_loss + self.data * (have + tokens / self.tokens) ** -self.data_exponent


def start_of(spec: RunSpec, n_layer: int) -> TransformerShape:
    """The shape that a surrogate starts with."""
    return start_shape(spec.model_copy(update={"host": spec.host.starting_with(n_layer)}), VOCABULARY)


def whole_steps(left: float, per_step: float) -> int:
    """Optimizer steps, at least one, until `left` is used up."""
    return max(1, math.ceil(left / per_step - 1e-9))


def budget_tokens(spec: RunSpec, shape: TransformerShape) -> float:
    """Tokens that the spec's whole budget holds at a shape."""
    tokens = batch_tokens(spec)
    return tokens * spec.budget.amount / spec.clock.axis_per_step(spec.budget.axis, shape, tokens)
