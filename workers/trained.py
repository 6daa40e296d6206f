"""What episodes that train a real host share: changes of the host, what they charge, the governor, and its rollbacks.

`GrowthRun` trains the host on data by itself; `OwnLoop` is trained by its user's loop.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from esper.platform.errors import UserError
from esper.platform.telemetry import Candidate
from esper.workers.episode import Episode, EpisodeState, Finite, Rollback
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.governor import fault
from esper.workers.kasmina.registry import Natural
from esper.workers.observe import GlobalMeasured, Measured
from esper.workers.tolaria.trainer import synchronize

STRIKES = 3  # faults in a row, without a sound decision between them, that end a run


class TrainedState(EpisodeState):
    """A TrainedEpisode's own attributes too."""

    measured: Measured
    window: list[Finite]
    inspected: Natural
    strikes: Natural


class Engine(Protocol):
    """What trains a host: a `Trainer`, or the user's loop."""

    @property
    def kasmina(self) -> Kasmina: ...
    @property
    def device(self) -> torch.device: ...
    # Of each step of this slice, from one on: [loss in nats, gradient norm without and with seeds on probation].
    def measured(self, since: int = 0) -> list[list[float]]: ...
    def forget(self) -> None: ...  # these rows
    def state(self) -> Any: ...
    def roll_back(self, good: Any) -> None: ...  # to a `state`; no number of a graft and no part's name is used twice


class TrainedEpisode(Episode):
    """An episode of a host of tensors, which `trainer` trains and grows."""

    trainer: Engine
    _good: Any  # the trainer's state at the start of the slice under way

    @property
    def kasmina(self) -> Kasmina:
        return self.trainer.kasmina

    def _start(self) -> None:
        self.measured = Measured()
        self.window: list[float] = []  # the governor's
        self.inspected = 0  # steps of this slice that the governor has looked at
        self.strikes = 0
        self._good = self.trainer.state()
        self._resized()
        axis, step = self.spec.budget.axis, float(self.layout.axis_per_step[0])
        if self.clock.amount < step and self.spec.clock.foretells(axis):
            what = f"the budget is {self.clock.amount:g} {axis}, and one optimizer step uses {step:,.6g}"
            raise UserError(f"{what}: set a larger budget.amount, or a smaller host or batch.")

    def _resized(self) -> None:
        self.shape = self.kasmina.host.shape
        self.planted = {seed.number: seed.planted for seed in self.kasmina.seeds}
        super()._resized()

    def _change(self, candidate: Candidate) -> None:
        begun, site = time.perf_counter(), candidate.site
        if site is not None and candidate.operation == "prune":
            self.kasmina.prune(site)
        elif site is not None:
            self.kasmina.graft(site, candidate.blueprint or "")
        else:
            return
        self._resized()
        self._charge(self.spec.clock.graft_seconds, begun)

    def _measured(self) -> Measured:
        return self.measured

    def _charge(self, predicted: float, begun: float, steps: int = 0, *, wait: bool = True) -> None:
        if wait:
            synchronize(self.trainer.device)
        measured = self._elapsed(begun)
        self.ledger.charge(
            seconds=self.spec.clock.reading(predicted, measured),
            wall_seconds=measured,
            parameters=self.layout.parameters,
            parameters_non_embedding=self.layout.non_embedding,
            steps=steps,
            tokens=steps * self.tokens_per_step,
            flops=steps * self.tokens_per_step * self.layout.flops_per_token,
        )

    def _elapsed(self, begun: float) -> float:
        return time.perf_counter() - begun

    def _fault(self, unread: int) -> str | None:
        """What the governor finds wrong in the steps since its last look, of `unread` in the slice."""
        wrong = fault(self.trainer.measured(since=self.inspected), self.window, self.vocab_size)
        if wrong is None:
            self.inspected = unread
        return wrong

    def _sound(self, loss: float, sites: Mapping[str, Mapping[str, float]]) -> None:
        """Close a slice that ended at this loss: its measures, among them those of `sites`; begin the next one."""
        rows = self.trainer.measured()
        norms = [norm for _, norm, _ in rows]
        told: dict[GlobalMeasured, float] = {"train_gap": (loss - statistics.fmean(row[0] for row in rows)) / loss}
        if len(norms) > 1:
            told["gradient_noise"] = statistics.pstdev(norms) / statistics.fmean(norms)
        found: dict[str, dict[str, float]] = {site: dict(values) for site, values in sites.items()}
        for seed in self.kasmina.seeds:
            found.setdefault(seed.site, {})["on_probation" if seed.on_probation else "established"] = 1.0
        self.measured = Measured(told, found)
        self._next_slice()
        self._good = self.trainer.state()

    def _next_slice(self) -> None:
        self.trainer.forget()
        self.inspected = 0
        for seed in self.kasmina.seeds:
            if not seed.on_probation:
                self.grafts[seed.number].outcome = "kept"

    def _note_sound(self) -> None:
        """Of a slice that has reached its end: faults are in a row no more, unless it had one itself."""
        if not self.rollbacks or self.rollbacks[-1].decision != self.sequence:
            self.strikes = 0

    def _roll_back(self, wrong: str) -> None:
        """Return to the slice's start and drop the newest graft if on probation; the cost of training stays charged."""
        begun = time.perf_counter()
        seeds = self.kasmina.seeds
        suspect = seeds[-1] if seeds and seeds[-1].on_probation else None
        self.trainer.roll_back(self._good)
        self._resized()
        undone = [number for number in self.planted if self.grafts[number].outcome == "pruned"]
        if undone:
            self.prunes.pop()
            for number in undone:
                self.grafts[number].outcome = None
        if suspect is not None:
            if suspect.number in self.planted:  # older than the slice
                suspect = self.kasmina.prune(suspect.site)  # another, where the slice had pruned a newer one
                self._good = self.trainer.state()
            there = {seed.number for seed in self.kasmina.seeds}
            for number in {suspect.number, *self.planted} - there:  # those inside it too
                self.grafts[number].outcome = "rolled back"
            until = self.clock.passed + 1 + self.spec.growth.lockout_decisions
            self.lockout.append((suspect.site, suspect.blueprint, until))
        removed = None if suspect is None else f"{suspect.blueprint} at {suspect.site}"
        self.rollbacks.append(Rollback(self.fraction(), self.sequence, self.ledger.steps, wrong, removed))
        self._next_slice()
        self._resized()
        self._charge(self.spec.clock.graft_seconds, begun)
        self.strikes += 1
