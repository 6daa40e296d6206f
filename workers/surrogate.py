"""SurrogateRun: an episode that computes its loss by a law instead of training; microseconds a decision.

    L(N, D) = E + A·N^(−α) + B·D^(−β)        (Hoffmann et al. 2022, 2203.15556, eq. 2)

N effective parameters, D effective tokens. A graft leaves the loss where it is: D becomes the tokens that the new
size would have needed for the loss now, so a grown run goes on from there, steeper; a prune gives back what D lost.
Heads, neurons and layers count towards N with weights that the seed draws, as it draws the law's constants; the ledger
charges by the spec's clock.
It stands in for GrowthRun wherever learning to decide is what is tried, and shows nothing about real growth: the
constants are of the order of character-level TinyStories with C = 32, but chosen so that growing too little, too much
or in the wrong place all cost a tenth of a nat or more (heads count for little, depth for much).
"""

import math
from dataclasses import dataclass

from esper.platform.contracts import HostShape
from esper.platform.seeding import stream
from esper.workers.candidates import Planted
from esper.workers.episode import Episode
from esper.workers.observe import Measured, batch_tokens
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.model.shape import TransformerShape

VOCABULARY = 96


@dataclass(frozen=True)
class Law:
    """The constants of one episode.

    Attributes:
        floor: E, nats.
        size: A.
        size_exponent: α.
        data: B.
        data_exponent: β.
        heads: how much an attention parameter counts against an MLP's.
        depth: exponent of (layers / layers at the start) with which depth multiplies the size.
    """

    floor: float
    size: float
    size_exponent: float
    data: float
    data_exponent: float
    heads: float
    depth: float

    @classmethod
    def drawn(cls, seed: int) -> "Law":
        """The law of a seed."""
        random = stream(seed, "law")
        return cls(
            floor=0.3,
            size=70 * random.uniform(0.97, 1.03),
            size_exponent=0.4,
            data=150e3 * random.uniform(0.9, 1.1),
            data_exponent=0.8,
            heads=random.uniform(0.0, 0.1),
            depth=random.uniform(1.1, 1.4),
        )

    def size_loss(self, shape: TransformerShape, start_layers: int) -> float:
        """E + A·N^(−α): what no amount of tokens removes at this shape."""
        attention = sum(4 * shape.n_embd * layer.heads * shape.head_dim for layer in shape.layers)
        other = shape.parameters_count() - attention
        effective = (self.heads * attention + other) * (shape.depth() / start_layers) ** self.depth
        return self.floor + self.size * effective**-self.size_exponent

    def tokens_for(self, loss: float, size_loss: float) -> float:
        """D at which a shape with this size loss has this loss."""
        return (self.data / (loss - size_loss)) ** (1 / self.data_exponent)


class SurrogateRun(Episode):
    """The Run contract over a loss law. Same spec, ledger, candidates, telemetry and reward as GrowthRun."""

    def _start(self) -> None:
        self.law = Law.drawn(self.seed if self.instance.law is None else self.instance.law)
        host = self.spec.host.model_copy(update={"n_layer": self.instance.n_layer or self.spec.host.n_layer})
        self.shape = start_shape(self.spec.model_copy(update={"host": host}), VOCABULARY)
        self._seeds: list[tuple[Planted, float]] = []  # with the effective tokens that growing to its size gave up
        self._begin_shape(math.log(VOCABULARY))

    def _begin_shape(self, loss: float) -> None:
        first = self.spec.host.n_layer
        self._size_loss = self.law.size_loss(self.shape, first)
        self._effective_tokens = self.law.tokens_for(loss, self._size_loss)

    def _shape(self) -> HostShape:
        return self.shape

    def _split(self) -> bool:
        return False

    def _vocab_size(self) -> int:
        return VOCABULARY

    def _graft(self, site: str, blueprint: str) -> None:
        loss, tokens, kind = self._evaluate(), self._effective_tokens, self.blueprints[blueprint]
        grown = kind.resized(self.shape, site)
        assert isinstance(grown, TransformerShape)
        part = "" if kind.units else grown.part_after(self.shape)
        self.shape = grown
        self._begin_shape(loss)
        self._seeds.append((Planted(site, blueprint, kind.units, part), tokens - self._effective_tokens))
        self._charge(self.spec.clock.graft_seconds, steps=0)

    def _prune(self, seed: Planted) -> None:
        shape = self.blueprints[seed.blueprint].pruned(self.shape, seed)
        assert isinstance(shape, TransformerShape)
        self.shape = shape
        self._size_loss = self.law.size_loss(shape, self.spec.host.n_layer)
        index = max(i for i, (planted, _) in enumerate(self._seeds) if planted == seed)
        self._effective_tokens += self._seeds.pop(index)[1]
        sites = {site.id for site in shape.injection_specs()}
        self._seeds = [(planted, given) for planted, given in self._seeds if planted.site in sites]
        self._charge(self.spec.clock.graft_seconds, steps=0)

    def _newest(self) -> tuple[Planted, ...]:
        return tuple({planted.site: planted for planted, _ in self._seeds}.values())

    def _train(self, boundary: float) -> float:
        tokens, clock = batch_tokens(self.spec), self.spec.clock
        per_step = clock.axis_per_step(self.spec.budget.axis, self.shape, tokens)
        steps = max(1, math.ceil((boundary - self.reading()) / per_step - 1e-9))
        self._charge(steps * clock.step_seconds(self.shape, tokens), steps=steps)
        self._effective_tokens += steps * tokens
        return self._evaluate()

    def _charge(self, seconds: float, steps: int) -> None:
        tokens = steps * batch_tokens(self.spec)
        self.ledger.charge(
            seconds=seconds,
            wall_seconds=seconds,
            parameters=self.shape.parameters_count(),
            parameters_non_embedding=self.shape.parameters_count(non_embedding=True),
            steps=steps,
            tokens=tokens,
            flops=tokens * self.shape.flops_per_token(),
        )

    def _evaluate(self) -> float:
        return self._size_loss + self.law.data * self._effective_tokens**-self.law.data_exponent

    def _measure(self) -> Measured:
        return Measured()
