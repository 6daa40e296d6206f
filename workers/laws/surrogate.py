"""SurrogateRun: an episode whose loss follows a scaling law; under a millisecond per decision.

A graft keeps the loss, a prune adds the rise in size loss. Continuous axes train parts of a step, so `oracle.py` is
exact. Observations are noisy, rewards and records exact. What `telemetry.HIDDEN` names is not shown.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from esper.platform.contracts import GraftAction
from esper.platform.law_file import FittedLaws
from esper.platform.ledger import Ledger
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate
from esper.workers.episode import Episode, EpisodeState
from esper.workers.kasmina.registry import Planted, shape_without
from esper.workers.laws.forecast import ensemble
from esper.workers.laws.scaling_law import CONTINUOUS, VOCABULARY, ScalingLaw, size_of, whole_steps
from esper.workers.observe import Measured
from esper.workers.run import CONTRIBUTION_SHARE
from esper.workers.tolaria.hosts import AnyShape
from esper.workers.tolaria.trainer import CONTRIBUTION_BATCHES

LOSS_NOISE = 0.003  # nats, of a validation loss as seen, where no run tells
LIKE = 8  # runs, those whose decisions began the most alike, of which one lends its errors
BATCH_NOISE, TWIN_NOISE = 0.02, 0.0003  # nats, of a batch's loss: shared by twins, and each twin's own


class SurrogateState(EpisodeState):
    """A SurrogateRun's own attributes too."""

    shape: AnyShape
    planted: dict[int, Planted]
    loss_now: float
    steps: float


class SurrogateRun(Episode):
    """The Run contract over a scaling law, with GrowthRun's spec, ledger, candidates, telemetry and reward.

    With `laws` it follows one of their ensemble, and all losses but the last differ from it as a fitted run's did.
    """

    State = SurrogateState

    def __init__(self, spec: RunSpec, laws: FittedLaws | None = None) -> None:
        super().__init__(spec, (laws and laws.vocab_size) or VOCABULARY)
        self.laws = laws

    def _start(self) -> None:
        number = self.seed if self.instance.law is None else self.instance.law
        self.shape = self._born
        self.planted = {}
        self.loss_now = math.log(VOCABULARY)
        self.steps = 0.0  # that the ledger's are the rounded sum of
        random, points = stream(self.seed, "noise"), self.spec.budget.decisions + 1
        self._errors = LOSS_NOISE * random.standard_normal(points)
        constants = self.laws and {name: values[number % len(values)] for name, values in self.laws.ensemble.items()}
        self.law = ScalingLaw(**constants) if constants else ScalingLaw.drawn(number, self.spec)
        if self.laws and self.laws.errors:
            axis, clock = self.spec.budget.axis, self.spec.clock
            steps = self.clock.slice / clock.axis_per_step(axis, self.shape, self.tokens_per_step)
            apart = [abs(math.log(tokens / (steps * self.tokens_per_step))) for tokens, _ in self.laws.errors]
            _, errors = self.laws.errors[int(random.choice(np.argsort(apart)[:LIKE]))]
            self._errors = np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(errors)), errors)

    def _resized(self) -> None:
        super()._resized()
        size = size_of(self.shape)[:, 0]
        self.size_loss, self.pace = self.law.size_loss(size), self.law.pace(size)

    def _tries(self, actions: Sequence[GraftAction], optimizer_steps: int) -> Iterator[tuple[np.ndarray, Ledger]]:
        random = stream(self.seed, "twins", self.ledger.steps)
        shared = BATCH_NOISE * random.standard_normal(optimizer_steps)
        tokens = self.tokens_per_step * np.arange(optimizer_steps)  # a batch's loss is that before its step
        for action in actions:
            twin = copy.copy(self)
            twin.ledger = replace(self.ledger)
            twin._change(twin._accept(action))
            own = TWIN_NOISE * random.standard_normal(optimizer_steps)
            losses = twin.law.trained(twin.loss_now, twin.size_loss, twin.pace * tokens) + shared + own
            twin._step(float(optimizer_steps))
            yield losses, twin.ledger

    def fraction(self) -> float:
        """Fraction of the budget spent, exact at a decision despite the ledger's rounding."""
        fraction, passed = super().fraction(), self.clock.passed / self.clock.decisions
        return passed if math.isclose(fraction, passed, rel_tol=1e-9) else fraction

    def seen(self) -> list[tuple[float, float]]:
        if self.laws is not None:
            return super().seen()
        return [(at, loss + float(error)) for (at, loss), error in zip(super().seen(), self._errors, strict=False)]

    def _change(self, candidate: Candidate) -> None:
        before, size_loss = self.shape, self.size_loss
        if candidate.operation == "graft":
            self.shape, seed = self.blueprints[candidate.blueprint or ""].planted(before, candidate.site or "")
            self.planted = {**self.planted, len(self.grafts): seed}
        elif candidate.operation == "prune":
            self.shape, self.planted = shape_without(before, self.planted, self.blueprints, candidate.site or "")
        else:
            return
        self._resized()
        if candidate.operation == "prune":
            self.loss_now += self.size_loss - size_loss
        self._charge(self.spec.clock.graft_seconds)

    def _train(self, boundary: float) -> tuple[float, float]:
        """Train to the boundary, or the next that a graft's cost has not passed; by fitted laws in whole steps."""
        reading, per_step = self.reading(), float(self.layout.axis_per_step[0])
        if self.spec.budget.axis in CONTINUOUS and self.laws is None:
            slice_ = self.clock.slice
            end = min(max(boundary, math.ceil(reading / slice_ - 1e-9) * slice_), self.clock.amount)
            self._step(max(0.0, end - reading) / per_step)
        else:
            steps = whole_steps(boundary - reading, per_step)
            self._step(float(steps))
            if self.laws is not None and self.fraction() < 1:
                self._charge(self._measuring(steps))
        for number in self.planted:
            self.grafts[number].outcome = None if self._young(number) else "kept"
        loss = self._evaluate()
        return loss, loss

    def _measuring(self, steps: int) -> float:
        """Seconds that a run would measure seeds' contributions for, after so many steps."""
        cost = CONTRIBUTION_BATCHES / 3  # of a pass, in steps
        sites = len({seed.site for seed in self.planted.values()})
        measured = min(sites, int(CONTRIBUTION_SHARE * steps / cost) - 1)
        return (1 + measured) * cost * self.layout.step_seconds if measured > 0 else 0.0

    def _step(self, steps: float) -> None:
        self.loss_now = self.law.trained(self.loss_now, self.size_loss, steps * self.tokens_per_step * self.pace)
        self._charge(steps * self.layout.step_seconds, steps)

    def _charge(self, seconds: float, steps: float = 0.0) -> None:
        self.steps += steps
        self.ledger.charge(
            seconds=seconds,
            wall_seconds=seconds,
            parameters=self.layout.parameters,
            parameters_non_embedding=self.layout.non_embedding,
            steps=round(self.steps) - self.ledger.steps,
            tokens=round(self.steps * self.tokens_per_step) - self.ledger.tokens,
            flops=steps * self.tokens_per_step * self.layout.flops_per_token,
        )

    def _evaluate(self) -> float:
        if self.laws is None or self.clock.ends(self.reading()):
            return self.loss_now
        error = float(self._errors[round(self.fraction() * self.clock.decisions)])
        return self.laws.offset + self.laws.factor * self.loss_now + error

    def _measured(self) -> Measured:
        sites: dict[str, dict[str, float]] = {}
        for number, seed in self.planted.items():
            sites.setdefault(seed.site, {})["on_probation" if self._young(number) else "established"] = 1.0
        return Measured(sites=sites)

    def _young(self, number: int) -> bool:
        return self.steps - self.grafts[number].optimizer_step < self.spec.growth.probation_steps


def drawn_laws(spec: RunSpec, numbers: Iterable[int]) -> FittedLaws:
    """What there is to know of a spec's surrogates before they are seen: these draws of their laws."""
    return FittedLaws(
        preset=spec.preset,
        tokenizer=spec.data.encoding,
        host=spec.host,
        text="",
        **dict.fromkeys(("runs", "grown", "losses", "residual", "misfit"), 0),
        command="drawn",
        noise=LOSS_NOISE,
        ensemble=ensemble([ScalingLaw.drawn(number, spec) for number in numbers]),
    )
