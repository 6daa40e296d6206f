"""The scaling law of a surrogate's loss, with constants drawn per episode.

    L(N, D) = E + A·(N/N₀)^(−α)·l^(−λ) + B·(D/D₀)^(−β)        (Hoffmann et al. 2022, 2203.15556, eq. 2, for λ = 0)

N effective parameters (N₀: one layer of the born shape), l layers, D effective tokens (D₀: that shape's in the spec's
budget), so A and B are nats. A token counts l^(−κ) of one: a deeper host gets further, and takes more tokens. The state
is L: D is what the current size would have needed for it, so grafts keep L continuous.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from esper.platform.contracts import HostShape
from esper.platform.errors import UserError
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.workers.observe import batch_tokens
from esper.workers.tolaria.hosts import start_shape

VOCABULARY = 96
SIZE = ("attention_parameters", "other_parameters", "layers", "expert_parameters")  # what a law knows of a shape
CONTINUOUS = ("parameter_seconds", "seconds", "flops")  # axes on which a surrogate trains parts of a step

Array = Any  # a float or a float64 array


def size_of(*shapes: HostShape) -> np.ndarray:
    """By `SIZE`, of attention's matrices, of all else but embeddings, layers, and of experts among these: (4, …)."""
    attention = [shape.attention_parameters() for shape in shapes]
    rest = [shape.parameters_count(non_embedding=True) for shape in shapes]
    gated = [shape.expert_parameters() for shape in shapes]
    return np.array([attention, np.subtract(rest, attention), [shape.depth() for shape in shapes], gated], float)


def size_at(point: Mapping[str, Any]) -> list[float]:
    """By `SIZE`, at a point of a run's curve; older runs did not tell experts from others."""
    return [float(point.get(name, 0)) for name in SIZE]


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
    depth: Array  # λ
    slowness: Array  # κ
    expert: Array  # how much an expert's parameter counts, in that of any other

    @classmethod
    def drawn(cls, seed: int, spec: RunSpec) -> Self:
        """Draw a seed's law from `spec.laws`; UserError where E + A may reach ln V."""
        laws, random, start = spec.laws, stream(seed, "law"), math.log(VOCABULARY)
        if (highest := laws.floor[1] + laws.size[1]) >= start:
            what = f"laws.floor and laws.size reach {highest:.2f} nats together"
            raise UserError(f"{what}, and a surrogate starts at ln {VOCABULARY} = {start:.2f}: set them lower.")
        drawn = {}  # what came later is drawn last, so its range does not change the others
        first = ("heads", "width", "layer", "size", "size_exponent", "data", "data_exponent", "floor")
        for name in (*first, "depth", "slowness", "expert"):
            low, high = getattr(laws, name)
            if name in ("heads", "width", "layer", "data"):
                drawn[name] = math.exp(random.uniform(math.log(low), math.log(high)))
            else:
                drawn[name] = float(random.uniform(low, high))
        one = start_shape(spec, VOCABULARY, 1)
        attention, other = size_of(one)[:2, 0].tolist()
        drawn["layer"] *= attention + other
        reference = drawn["heads"] * attention + drawn["width"] * other + drawn["layer"]
        return cls(**drawn, reference=reference, tokens=budget_tokens(spec, one))

    def size_loss(self, size: Sequence[Array] | np.ndarray) -> Array:
        """E + A·(N/N₀)^(−α)·l^(−λ), nats, of a `size_of`: the loss at infinite tokens; every growth lowers it."""
        relative = (self.effective(size) / self.reference) ** -self.size_exponent
        return self.floor + self.size * relative * size[2] ** -self.depth

    def effective(self, size: Sequence[Array] | np.ndarray) -> Array:
        """N of a `size_of`."""
        attention, other, layers, gated = size
        return self.heads * attention + self.width * (other + (self.expert - 1) * gated) + self.layer * layers

    def pace(self, size: Sequence[Array] | np.ndarray) -> Array:
        """What a token counts at a `size_of`: l^(−κ)."""
        return size[2] ** -self.slowness

    def trained(self, loss: Array, size_loss: Array, tokens: Array) -> Array:
        """The loss after `tokens` more, times the size's `pace`, monotone in `loss`, which must exceed `size_loss`."""
        have = ((loss - size_loss) / self.data) ** (-1 / self.data_exponent)
        return size_loss + self.data * (have + tokens / self.tokens) ** -self.data_exponent

    def followed(self, sizes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Losses after each stage (S, …), by sizes (S, 4, …) and tokens (S, …); a prune adds the rise in size loss."""
        loss, found, before = math.log(VOCABULARY), [], self.size_loss(sizes[0])
        for size, more in zip(sizes, tokens, strict=True):
            after = self.size_loss(size)
            risen = loss + np.maximum(0.0, after - before)
            loss, before = self.trained(risen, after, more * self.pace(size)), after
            found.append(loss)
        return np.array(found)


def whole_steps(left: float, per_step: float) -> int:
    """Optimizer steps, at least one, until `left` is used up."""
    return max(1, math.ceil(left / per_step - 1e-9))


def budget_tokens(spec: RunSpec, shape: HostShape) -> float:
    """Tokens that the spec's whole budget holds at a shape."""
    tokens = batch_tokens(spec)
    return tokens * spec.budget.amount / spec.clock.axis_per_step(spec.budget.axis, shape, tokens)
