"""GrowthRun: one GPT's whole training run on text, as an episode. Pure Python and torch, no Ray.

`reset` and `step` are those of every run (`workers/episode.py`); here are the five things that training adds.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from esper.platform.contracts import GraftAction, HostShape
from esper.platform.spec import RunSpec
from esper.workers.episode import Episode
from esper.workers.observe import Measured, batch_tokens
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.device import synchronize
from esper.workers.tolaria.rate import rate
from esper.workers.tolaria.trainer import Trainer


class GrowthRun(Episode):
    """An episode that trains a host.

    Args:
        spec: what the run is.
        data: prepared shards.
        on_step: called after every optimizer step, for progress; must be quick.

    Attributes:
        parameters: of the host now.
        tokens_per_step: tokens of one optimizer step.
    """

    def __init__(self, spec: RunSpec, data: TokenData, on_step: Callable[["GrowthRun"], None] | None = None) -> None:
        super().__init__(spec)
        self._data = data
        self._on_step = on_step
        self.trainer: Trainer  # made by reset

    def fork(self) -> Self:
        """An independent copy in memory, at the same point, over the same text."""
        callback, self._on_step = self._on_step, None
        try:
            return copy.deepcopy(self, {id(self._data): self._data})
        finally:
            self._on_step = callback

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> np.ndarray:
        """Training losses that each action leads to on the same batches, float64 (len(actions), optimizer_steps)."""
        losses = []
        for action in actions:
            twin = self.fork()
            candidate = twin._accept(action)
            if candidate.operation == "graft":
                twin._apply(candidate, action.reason)
            for _ in range(optimizer_steps):
                twin._optimizer_step()
            losses.append(twin.trainer.take_losses()[-optimizer_steps:])
        return np.array(losses)

    # -- Episode -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.trainer = Trainer(self.spec, self._data, self.blueprints, self.seed, self.instance)
        self._measured = Measured()
        self._resized()

    def _shape(self) -> HostShape:
        return self.trainer.host.shape

    def _split(self) -> bool:
        return self._is_split

    def _vocab_size(self) -> int:
        return self._data.manifest.vocab_size

    def _graft(self, site: str, blueprint: str) -> float:
        begun = time.perf_counter()
        self.trainer.graft(site, blueprint)
        synchronize(self.trainer.device)
        self._resized()
        self._charge(self.spec.clock.graft_seconds, time.perf_counter() - begun)
        return self._evaluate()

    def _train(self, boundary: float) -> None:
        while True:
            self._optimizer_step()
            if self.reading() >= boundary:
                break
        if self.spec.clock.kind != "wall":  # which waits at every step: here the rest of the slice is waited for
            begun = time.perf_counter()
            synchronize(self.trainer.device)
            self.ledger.wall_seconds += time.perf_counter() - begun
        self._measured = self._take_measures()

    def _evaluate(self) -> float:
        begun = time.perf_counter()
        loss = self.trainer.evaluate()
        self.ledger.validation_seconds += time.perf_counter() - begun
        return loss

    def _measure(self) -> Measured:
        return self._measured

    # -- Helpers -------------------------------------------------------------------------------------------------

    def _optimizer_step(self) -> None:
        begun = time.perf_counter()
        self.trainer.step(self._rate())
        if self.spec.clock.kind == "wall":
            synchronize(self.trainer.device)
        self._charge(self._step_seconds, time.perf_counter() - begun, steps=1)
        if self._on_step is not None:
            self._on_step(self)

    def _rate(self) -> float:
        """The host's rate now; a seed counts towards the size as it warms up, so the rate glides to the new size's."""
        size = self._parameters_non_embedding - self.trainer.kasmina.parameters_warming_up()
        return rate(self.spec.optimizer, self.fraction(), size)

    def _resized(self) -> None:
        """Note what a step costs at the shape now."""
        shape = self._shape()
        self._is_split = self.trainer.host.split()
        self.parameters = shape.parameters_count()
        self._parameters_non_embedding = shape.parameters_count(non_embedding=True)
        self.tokens_per_step = batch_tokens(self.spec)
        self._flops = self.tokens_per_step * shape.flops_per_token()
        self._step_seconds = self.spec.clock.step_seconds(shape, self.tokens_per_step, split=self._is_split)

    def _charge(self, predicted: float, measured: float, steps: int = 0) -> None:
        self.ledger.charge(
            seconds=self.spec.clock.reading(predicted, measured),
            wall_seconds=measured,
            parameters=self.parameters,
            parameters_non_embedding=self._parameters_non_embedding,
            steps=steps,
            tokens=steps * self.tokens_per_step,
            flops=steps * self._flops,
        )

    def _take_measures(self) -> Measured:
        losses, norms = self.trainer.take_losses(), self.trainer.take_norms()
        stages: dict[str, tuple[bool, bool]] = {}
        for seed in self.trainer.kasmina.seeds:
            young, old = stages.get(seed.site, (False, False))
            probation = self.trainer.kasmina.on_probation(seed)
            stages[seed.site] = (young or probation, old or not probation)
        sound = all(map(math.isfinite, losses)) and all(map(math.isfinite, norms))
        return Measured(
            train_loss=statistics.fmean(losses) if sound else None,
            gradient_noise=statistics.pstdev(norms) / statistics.fmean(norms) if sound and len(norms) > 1 else None,
            norms=self.trainer.site_norms(),
            stages=stages,
        )
