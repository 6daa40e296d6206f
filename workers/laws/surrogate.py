"""SurrogateRun: an episode whose loss follows a scaling law; under a millisecond per decision.

A graft keeps the loss, a prune adds the rise in size loss. Continuous axes train parts of a step, so `oracle.py` is
exact. Observations are noisy, rewards and records exact; a site's gradient norm is a noisy gain of a graft there.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from esper.platform.contracts import GraftAction
from esper.platform.law_file import FittedLaws
from esper.platform.ledger import Ledger
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate
from esper.workers.episode import Episode, EpisodeState
from esper.workers.kasmina.registry import Planted
from esper.workers.laws.forecast import ensemble
from esper.workers.laws.scaling_law import CONTINUOUS, VOCABULARY, ScalingLaw, size_of, whole_steps
from esper.workers.observe import Layout, Measured, norm_fields
from esper.workers.tolaria.model.shape import TransformerShape

LOSS_NOISE = 0.003  # nats, of a validation loss as seen
NORM_NOISE = 0.2  # of the logarithm of a gradient norm as seen
BATCH_NOISE, TWIN_NOISE = 0.02, 0.0003  # nats, of a batch's loss: shared by twins, and each twin's own
UPDATE = 0.01  # norm of an update over the gradient's


class SurrogateState(EpisodeState):
    """A SurrogateRun's own attributes too."""

    shape: TransformerShape
    planted: dict[int, Planted]
    loss_now: float
    steps: float


class SurrogateRun(Episode):
    """The Run contract over a scaling law, with GrowthRun's spec, ledger, candidates, telemetry and reward."""

    State = SurrogateState

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec, VOCABULARY)

    def _start(self) -> None:
        self.law = ScalingLaw.drawn(self.seed if self.instance.law is None else self.instance.law, self.spec)
        self.shape = self._born
        self.planted = {}
        self.loss_now = math.log(VOCABULARY)
        self.steps = 0.0  # that the ledger's are the rounded sum of
        random, points = stream(self.seed, "noise"), self.spec.budget.decisions + 1
        self._loss_noise = LOSS_NOISE * random.standard_normal(points)
        self._norm_noise = NORM_NOISE * random.standard_normal((points, self.space.sites))

    def _resized(self) -> None:
        super()._resized()
        self._uses: dict[str, float] = {}  # site → nats by which a graft there lowers the size loss
        (_, now), *grafts = _sizes(self.layout)
        self.size_loss, self.pace = self.law.size_loss(now), self.law.pace(now)
        for site, size in grafts:
            self._uses[site] = max(self._uses.get(site, 0.0), self.size_loss - self.law.size_loss(size))

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

    def seen(self) -> list[tuple[float, float]]:  # with noise
        return [(at, loss + float(error)) for (at, loss), error in zip(super().seen(), self._loss_noise, strict=False)]

    def _change(self, candidate: Candidate) -> None:
        before, size_loss = self.shape, self.size_loss
        if candidate.operation == "graft":
            kind, site = self.blueprints[candidate.blueprint or ""], candidate.site or ""
            self.shape = kind.resized(before, site)
            part = "" if kind.units else self.shape.part_after(before)
            self.planted = {**self.planted, len(self.grafts): Planted(site, kind.name, kind.units, part)}
        elif candidate.operation == "prune":
            number = max(number for number, seed in self.planted.items() if seed.site == candidate.site)
            seed = self.planted[number]
            self.shape = self.blueprints[seed.blueprint].pruned(before, seed)
            there = {site.id for site in self.shape.injection_specs()} | {f"h{each.uid}" for each in self.shape.layers}
            left = {n: each for n, each in self.planted.items() if n != number}
            self.planted = {n: each for n, each in left.items() if each.site in there or each.part in there}
        else:
            return
        self._resized()
        if candidate.operation == "prune":
            self.loss_now += self.size_loss - size_loss
        self._charge(self.spec.clock.graft_seconds)

    def _train(self, boundary: float) -> tuple[float, float]:
        """On continuous axes train exactly to the boundary, or to the next one that a graft's cost has not passed."""
        reading, per_step = self.reading(), float(self.layout.axis_per_step[0])
        if self.spec.budget.axis in CONTINUOUS:
            slice_ = self.clock.slice
            end = min(max(boundary, math.ceil(reading / slice_ - 1e-9) * slice_), self.clock.amount)
            self._step(max(0.0, end - reading) / per_step)
        else:
            self._step(float(whole_steps(boundary - reading, per_step)))
        return self.loss_now, self.loss_now

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
        return self.loss_now

    def _measured(self) -> Measured:
        if not self.sequence:
            return Measured()
        noisy = zip(self._uses.items(), self._norm_noise[self.sequence], strict=False)
        norms = {site: use * math.exp(error) for (site, use), error in noisy}
        return Measured(sites={site: norm_fields(norm, UPDATE * norm) for site, norm in norms.items() if norm > 0})


def drawn_laws(spec: RunSpec, numbers: Iterable[int]) -> FittedLaws:
    """What there is to know of a spec's surrogates before they are seen: these draws of their laws."""
    return FittedLaws(
        preset=spec.preset,
        tokenizer=spec.data.tokenizer,
        host=spec.host,
        text="",
        **dict.fromkeys(("runs", "grown", "losses", "residual", "misfit"), 0),
        command="drawn",
        noise=LOSS_NOISE,
        ensemble=ensemble([ScalingLaw.drawn(number, spec) for number in numbers]),
    )


@lru_cache(maxsize=512)
def _sizes(layout: Layout) -> list[tuple[str, list[float]]]:
    """(Site, size) of WAIT, then of every graft."""
    options: Any = [each for each in layout.options if each.candidate.operation != "prune" and each.after is not None]
    sizes = size_of(*(each.after for each in options)).T.tolist()
    return [(each.candidate.site or "", size) for each, size in zip(options, sizes, strict=True)]
