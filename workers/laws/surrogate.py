"""SurrogateRun: an episode whose loss follows a scaling law; under a millisecond per decision.

A graft keeps the loss, a prune adds the rise in size loss. Continuous axes train parts of a step, so `oracle.py` is
exact. Observations are noisy, rewards and records exact; a site's gradient norm is a noisy gain of a graft there.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import ConfigDict

from esper.platform.contracts import GraftAction, HostShape
from esper.platform.frozen import Frozen
from esper.platform.ledger import Ledger
from esper.platform.seeding import stream
from esper.platform.spec import LayerSpec
from esper.platform.telemetry import Candidate
from esper.workers.episode import Episode
from esper.workers.kasmina.registry import Planted
from esper.workers.laws.scaling_law import CONTINUOUS, VOCABULARY, ScalingLaw, Size, start_of, whole_steps
from esper.workers.observe import Layout, Measured, batch_tokens
from esper.workers.records import EpisodeState

LOSS_NOISE = 0.003  # nats, of a validation loss as seen
NORM_NOISE = 0.2  # of the logarithm of a gradient norm as seen
BATCH_NOISE, TWIN_NOISE = 0.02, 0.0003  # nats, of a batch's loss: shared by twins, and each twin's own
UPDATE = 0.01  # norm of an update over the gradient's


class SurrogateState(Frozen):
    """A SurrogateRun's state; callers may add keys."""

    model_config = ConfigDict(extra="ignore")

    episode: EpisodeState
    layers: tuple[LayerSpec, ...]
    next_uid: int
    seeds: list[tuple[int, Planted]]
    own_loss: float
    steps: float


class SurrogateRun(Episode):
    """The Run contract over a scaling law, with GrowthRun's spec, ledger, candidates, telemetry and reward."""

    shape: Any

    def _start(self) -> None:
        self.law = ScalingLaw.drawn(self.seed if self.instance.law is None else self.instance.law, self.spec)
        self.shape = start_of(self.spec, self.instance.n_layer or self.spec.host.n_layer)
        self._start_shape = self.shape
        self._seeds: dict[int, Planted] = {}
        self._loss = math.log(VOCABULARY)
        self._steps = 0.0  # that the ledger's are the rounded sum of
        self._tokens_per_step = batch_tokens(self.spec)
        random, points = stream(self.seed, "noise"), self.spec.budget.decisions + 1
        self._loss_noise = LOSS_NOISE * random.standard_normal(points)
        self._norm_noise = NORM_NOISE * random.standard_normal((points, self.space.sites))
        self._resized()

    def _resized(self) -> None:
        clock, shape, tokens = self.spec.clock, self.shape, self._tokens_per_step
        self._size_loss = self.law.size_loss(Size.of(shape))
        self._per_step = clock.axis_per_step(self.spec.budget.axis, shape, tokens)
        self._step_seconds = clock.step_seconds(shape, tokens)
        self._uses: dict[str, float] = {}  # site → nats by which a graft there lowers the size loss
        for site, size in _grown(self._layout()):
            self._uses[site] = max(self._uses.get(site, 0.0), self._size_loss - self.law.size_loss(size))

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> tuple[np.ndarray, list[Ledger]]:
        """Training losses after each action, float64 (actions, steps), and the copies' ledgers."""
        random = stream(self.seed, "twins", self.ledger.steps)
        shared = BATCH_NOISE * random.standard_normal(optimizer_steps)
        tokens = self._tokens_per_step * np.arange(optimizer_steps)  # a batch's loss is that before its step
        losses, ledgers = [], []
        for action in actions:
            twin = copy.copy(self)
            twin.ledger, twin._seeds = replace(self.ledger), dict(self._seeds)
            twin._change(twin._accept(action))
            own = TWIN_NOISE * random.standard_normal(optimizer_steps)
            losses.append(twin.law.trained(twin._loss, twin._size_loss, tokens) + shared + own)
            twin._step(float(optimizer_steps))
            ledgers.append(twin.ledger)
        return np.array(losses), ledgers

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that `load` needs to continue to the same numbers: JSON values, and no tensors."""
        values = SurrogateState(
            episode=self._episode_state(),
            layers=self.shape.layers,
            next_uid=self.shape.born.uid,
            seeds=list(self._seeds.items()),
            own_loss=self._loss,
            steps=self._steps,
        )
        return values.model_dump(mode="json"), {}

    def load(self, values: dict[str, Any], tensors: Mapping[str, Any] | None = None) -> None:
        """Restore a `state` of the same spec."""
        state = SurrogateState.checked(values, "the checkpoint")
        self._load_episode(state.episode)
        born = self.shape.born.model_copy(update={"uid": state.next_uid})
        self.shape = replace(self.shape, born=born, layers=state.layers)
        self._seeds, self._loss, self._steps = dict(state.seeds), state.own_loss, state.steps
        self._resized()
        self.telemetry = self._look()

    def fraction(self) -> float:
        """Fraction of the budget spent, exact at a decision despite the ledger's rounding."""
        fraction, passed = super().fraction(), self.clock.passed / self.clock.decisions
        return passed if math.isclose(fraction, passed, rel_tol=1e-9) else fraction

    def _shape(self) -> HostShape:
        return self.shape

    def _split(self) -> bool:
        return False

    def _vocab_size(self) -> int:
        return VOCABULARY

    def _planted(self) -> dict[int, Planted]:
        return dict(self._seeds)

    def _change(self, candidate: Candidate) -> None:
        before, loss = self.shape, self._size_loss
        if candidate.operation == "graft":
            kind, site = self.blueprints[candidate.blueprint or ""], candidate.site or ""
            self.shape = kind.resized(before, site)
            part = "" if kind.units else self.shape.part_after(before)
            self._seeds[len(self.grafts)] = Planted(site, kind.name, kind.units, part)
        elif candidate.operation == "prune":
            seed = self._seeds.pop(max(n for n, seed in self._seeds.items() if seed.site == candidate.site))
            self.shape = self.blueprints[seed.blueprint].pruned(before, seed)
            there = {site.id for site in self.shape.injection_specs()} | {
                f"h{layer.uid}" for layer in self.shape.layers
            }
            self._seeds = {n: seed for n, seed in self._seeds.items() if seed.site in there or seed.part in there}
        else:
            return
        self._resized()
        if candidate.operation == "prune":
            self._loss += self._size_loss - loss
        self._charge(self.spec.clock.graft_seconds)

    def _train(self, boundary: float) -> float:
        """On continuous axes train exactly to the boundary, or to the next one that a graft's cost has not passed."""
        reading = self.reading()
        if self.spec.budget.axis in CONTINUOUS:
            slice_ = self.clock.slice
            end = min(max(boundary, math.ceil(reading / slice_ - 1e-9) * slice_), self.clock.amount)
            self._step(max(0.0, end - reading) / self._per_step)
        else:
            self._step(float(whole_steps(boundary - reading, self._per_step)))
        return self._loss

    def _step(self, steps: float) -> None:
        self._loss = self.law.trained(self._loss, self._size_loss, steps * self._tokens_per_step)
        self._charge(steps * self._step_seconds, steps)

    def _charge(self, seconds: float, steps: float = 0.0) -> None:
        self._steps += steps
        self.ledger.charge(
            seconds=seconds,
            wall_seconds=seconds,
            parameters=self.shape.parameters_count(),
            parameters_non_embedding=self.shape.parameters_count(non_embedding=True),
            steps=round(self._steps) - self.ledger.steps,
            tokens=round(self._steps * self._tokens_per_step) - self.ledger.tokens,
            flops=steps * self._tokens_per_step * self.shape.flops_per_token(),
        )

    def _evaluate(self) -> float:
        return self._loss

    def _seen(self) -> list[tuple[float, float]]:
        return [(at, loss + float(error)) for (at, loss), error in zip(super()._seen(), self._loss_noise, strict=False)]

    def _measure(self) -> Measured:
        if not self.sequence:
            return Measured()
        noisy = zip(self._uses.items(), self._norm_noise[self.sequence], strict=False)
        seen = [(site, use * math.exp(error)) for (site, use), error in noisy]
        return Measured(norms={site: (norm, UPDATE * norm) for site, norm in seen if norm > 0})


@lru_cache(maxsize=512)
def _grown(layout: Layout) -> tuple[tuple[str, Size], ...]:
    options: Any = layout.options
    grafts = (each for each in options if each.candidate.operation == "graft" and each.after is not None)
    return tuple((option.candidate.site, Size.of(option.after)) for option in grafts)
