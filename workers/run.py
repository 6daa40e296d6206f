"""GrowthRun: an episode (`workers/episode.py`) that trains a GPT on text, with forks, rollbacks and saving. No Ray.

A slice is trained, evaluated and measured, then cooldowns run. It can stop at any `_pause` and resume to the same
numbers: progress is the count of unread steps, then `_reached` once only cooldowns are left.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import ConfigDict, Field
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.contracts import GraftAction, HostShape
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate
from esper.workers.episode import Episode
from esper.workers.kasmina.governor import CHECK_EVERY, Governor
from esper.workers.kasmina.registry import Natural, Planted
from esper.workers.observe import Measured, batch_tokens
from esper.workers.records import EpisodeState, Point, Rollback
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.device import synchronize
from esper.workers.tolaria.rate import rate
from esper.workers.tolaria.trainer import Snapshot, Trainer, TrainerState, within

CONTRIBUTION_SHARE = 0.02  # of a slice's steps that measuring contributions may cost
STRIKES = 3  # faults in a row, without a sound decision between them, that end a run


class RunState(Frozen):
    """A GrowthRun without its tensors; callers may add keys."""

    model_config = ConfigDict(extra="ignore")

    data: str  # fingerprint of the text
    episode: EpisodeState
    trainer: dict[str, TrainerState]  # `now`, and where that is another, `good`
    measured: Measured
    contributed: dict[str, tuple[float, Natural, Natural]]
    norms: dict[str, tuple[float, float]]
    window: list[float]
    checked_steps: Natural
    strikes: Natural
    reached: Annotated[float, Field(gt=0)] | None


class GrowthRun(Episode):
    """An episode that trains a host.

    `on_step` is called with the run after each optimizer step (a copy's too) and each part of an evaluation. An
    exception from it stops the run there: `state` saves that point, and `finish` resumes from it.
    """

    def __init__(self, spec: RunSpec, data: TokenData, on_step: Callable[["GrowthRun"], None] | None = None) -> None:
        super().__init__(spec)
        self._data = data
        self.on_step = on_step
        self.tokens_per_step = batch_tokens(spec)
        self.trainer: Trainer  # made by reset

    def fork(self) -> Self:
        """An independent copy in memory over the same text."""
        callback, self.on_step = self.on_step, None
        shared = {id(kept): kept for kept in (self._data, self._good, self.spec, self.observer)}  # never changed
        try:
            return copy.deepcopy(self, shared)
        finally:
            self.on_step = callback

    def _trial(self) -> Self:
        fork = self.fork()
        fork.on_step = lambda _: self._pause()
        return fork

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> tuple[np.ndarray, list[Ledger]]:
        """As `Episode.twins` says."""
        losses, ledgers = [], []
        for action in actions:
            twin = self._trial()
            twin._change(twin._accept(action))
            twin.trainer.forget()
            for _ in range(optimizer_steps):
                twin._optimizer_step()
                twin._pause()
            losses.append([row[0] for row in twin.trainer.measured()])
            ledgers.append(twin.ledger)
        return np.array(losses), ledgers

    def cooldown(self) -> Point:
        """Estimates the final loss of a smaller budget: a fork's rate decays from here; this run is not charged.

        At budget fraction u the fork decays until u / `optimizer.decay_from`. `val_loss` is None after a fault.
        """
        fork = self._trial()
        end = min(1.0, fork.fraction() / self.spec.optimizer.decay_from)
        fork._decay = (fork.fraction(), end)
        fault = fork._train_to(end * fork.clock.amount)
        fork.loss = fork._evaluate()
        sound = fault is None and math.isfinite(fork.loss)
        return {**fork._point(), "val_loss": fork.loss if sound else None}

    def save(self, path: Path) -> None:
        """Save as a file (`platform/checkpoint.py`)."""
        checkpoint.write(path, *self.state())

    @classmethod
    def restore(cls, path: Path, data: TokenData, on_step: Callable[["GrowthRun"], None] | None = None) -> "GrowthRun":
        """Load a saved run; it continues bit for bit on the CPU by the reference clock."""
        values, tensors = checkpoint.read(path)
        run = cls(RunState.checked(values, f"the checkpoint {path}").episode.spec, data, on_step)
        run.load(values, tensors)
        return run

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that `load` needs to continue to the same numbers: JSON values, and tensors by name."""
        snapshots = {"now": self.trainer.state(), "good": self._good} if self.unfinished else {"now": self._good}
        values = RunState(
            data=self._data.manifest.fingerprint(),
            episode=self._episode_state(),
            trainer={place: snapshot[0] for place, snapshot in snapshots.items()},
            measured=self._measured,
            contributed=self._contributed,
            norms=self._norms,
            window=self._governor.window,
            checked_steps=self._checked,
            strikes=self._strikes,
            reached=self._reached,
        )
        tensors = {f"{place}/{name}": t for place, snapshot in snapshots.items() for name, t in snapshot[1].items()}
        return values.model_dump(mode="json"), tensors

    def load(self, values: Any, tensors: Mapping[str, Tensor]) -> None:
        """Restore a `state` of the same spec; UserError for other text, another tokenizer or an impossible state."""
        state = RunState.checked(values, "the checkpoint")
        if state.data != self._data.manifest.fingerprint():
            raise UserError(
                "the checkpoint was saved over other text or another tokenizer than the data given: give it the same."
            )
        self._load_episode(state.episode)
        snapshots: dict[str, Snapshot] = {
            place: (saved, within(f"{place}/", tensors)) for place, saved in state.trainer.items()
        }
        counts = [state.trainer[place].grafts for place in ("good", "now") if place in state.trainer]
        if (
            snapshots.keys() - {"good"} != {"now"}
            or max(counts) != counts[-1]
            or counts[-1] != len(self.grafts)
            or state.strikes > len(self.rollbacks)
        ):
            raise UserError("the checkpoint's trainer is not that of its episode: restore an older copy of it.")
        if "good" in snapshots:
            self.trainer.load(*snapshots["good"])  # to check that a rollback can
        self.trainer.load(*snapshots["now"])
        self._good = snapshots.get("good", snapshots["now"])
        self._measured, self._contributed, self._norms = state.measured, state.contributed, state.norms
        self._governor.window = state.window
        self._checked, self._strikes, self._reached = state.checked_steps, state.strikes, state.reached
        self._resized()
        self.telemetry = self._look()

    def _start(self) -> None:
        self.trainer = Trainer(self.spec, self._data, self.blueprints, self.seed, self.instance)
        self._measured = Measured()
        self._norms: dict[str, tuple[float, float]] = {}  # at the last step of a slice
        self._reached: float | None = None  # loss at the end of a slice of which only cooldowns are left
        self._decay: tuple[float, float] | None = None  # of a cooldown fork: where its rate starts and ends to fall
        self._governor = Governor(self._vocab_size())
        self._checked = 0  # steps of this slice that the governor has looked at
        self._strikes = 0
        self._contributed: dict[str, tuple[float, int, int]] = {}  # site → (value, number of its seed, decision)
        self._good: Snapshot = self.trainer.state()  # as the slice under way began, before its action
        self._resized()
        axis, clock = self.spec.budget.axis, self.spec.clock
        step = clock.axis_per_step(axis, self._shape(), self.tokens_per_step)
        if self.clock.amount < step and (clock.kind == "reference" or axis in ("steps", "tokens", "flops")):
            raise UserError(
                f"the budget is {self.clock.amount:g} {axis}, and one optimizer step uses {step:,.6g}: "
                "set a larger budget.amount, or a smaller host or batch."
            )

    def _shape(self) -> HostShape:
        return self.trainer.host.shape

    def _split(self) -> bool:
        return self._is_split

    def _point(self) -> Point:
        return {**super()._point(), "learning_rate": self._rate()}

    def _vocab_size(self) -> int:
        return self._data.manifest.vocab_size

    def _planted(self) -> dict[int, Planted]:
        return {seed.number: seed.planted for seed in self.trainer.kasmina.seeds}

    def _change(self, candidate: Candidate) -> None:
        begun, site = time.perf_counter(), candidate.site or ""
        if candidate.operation == "graft":
            self.trainer.kasmina.graft(site, candidate.blueprint or "")
        elif candidate.operation == "prune":
            self.trainer.kasmina.prune(site)
        else:
            return
        self._resized()
        self._charge(self.spec.clock.graft_seconds, begun)

    def _train(self, boundary: float) -> float:
        if self._reached is None:
            loss = self._train_soundly(boundary)
            if self.failure is not None:
                return loss
            self._measured = self._take_measures()
            self._next_slice()
            self._good = self.trainer.state()
            self._reached = loss
        for at in self.spec.budget.cooldowns[len(self.annealed) :]:
            if self.fraction() < at * self.spec.optimizer.decay_from:
                break
            self.annealed.append(self.cooldown())
        loss, self._reached = self._reached, None
        return loss

    def _evaluate(self) -> float:
        begun = time.perf_counter()
        loss = self.trainer.evaluate(self._pause)
        self.ledger.validation_seconds += time.perf_counter() - begun
        return loss

    def _measure(self) -> Measured:
        return self._measured

    def _train_soundly(self, boundary: float) -> float:
        """Train to a reading and return the loss there; faults are rolled back, `STRIKES` in a row end the run."""
        while self._strikes < STRIKES:
            fault, loss = self._train_to(boundary), math.nan
            if fault is None:
                loss = self._evaluate()
                if math.isfinite(loss):
                    if not self.rollbacks or self.rollbacks[-1].decision != self.sequence:
                        self._strikes = 0
                    return loss
            self._roll_back(fault or "the validation loss was not finite")
        self._good = self.trainer.state()
        loss = self._evaluate()
        self.failure = f"{self.rollbacks[-1].fault}, {STRIKES} times in a row"
        return loss

    def _train_to(self, boundary: float) -> str | None:
        """Train to a reading, at least one step; returns the governor's fault, if any."""
        while self.trainer.unread == 0 or self.reading() < boundary:
            self._optimizer_step()
            done = self.reading() >= boundary
            if done or self.trainer.unread - self._checked >= CHECK_EVERY:
                fault = self._governor.fault(self.trainer.measured(since=self._checked))
                if fault is not None:
                    return fault
                self._checked = self.trainer.unread
            if done:
                begun = time.perf_counter()
                synchronize(self.trainer.device)  # for the rest of the slice; the wall clock waits at every step
                self.ledger.wall_seconds += 0.0 if self.spec.clock.kind == "wall" else time.perf_counter() - begun
                self._norms = self.trainer.site_norms()
            self._pause()
        return None

    def _pause(self) -> None:
        if self.on_step is not None:
            self.on_step(self)

    def _optimizer_step(self) -> None:
        begun = time.perf_counter()
        self.trainer.step(self._rate())
        self._charge(self._step_seconds, begun, steps=1, wait=self.spec.clock.kind == "wall")
        if self.trainer.kasmina.due:
            begun = time.perf_counter()
            fused = self.trainer.kasmina.fuse()
            self._charge(len(fused) * self.spec.clock.fuse_seconds, begun)
            self._resized()

    def _rate(self) -> float:
        """The host's rate; a seed counts towards the size as it warms up, so the rate changes smoothly."""
        size = self._parameters_non_embedding - self.trainer.kasmina.parameters_warming_up()
        return rate(self.spec.optimizer, self.fraction(), size, self._decay)

    def _resized(self) -> None:
        shape = self._shape()
        self._is_split = self.trainer.host.split()
        self.parameters = shape.parameters_count()
        self._parameters_non_embedding = shape.parameters_count(non_embedding=True)
        self._flops = self.tokens_per_step * shape.flops_per_token()
        self._step_seconds = self.spec.clock.step_seconds(shape, self.tokens_per_step, split=self._is_split)

    def _charge(self, predicted: float, begun: float, steps: int = 0, *, wait: bool = True) -> None:
        if wait:
            synchronize(self.trainer.device)
        measured = time.perf_counter() - begun
        self.ledger.charge(
            seconds=self.spec.clock.reading(predicted, measured),
            wall_seconds=measured,
            parameters=self.parameters,
            parameters_non_embedding=self._parameters_non_embedding,
            steps=steps,
            tokens=steps * self.tokens_per_step,
            flops=steps * self._flops,
        )

    def _next_slice(self) -> None:
        self.trainer.forget()
        self._checked = 0
        for seed in self.trainer.kasmina.seeds:
            if not seed.on_probation:
                self.grafts[seed.number].outcome = "kept"

    def _take_measures(self) -> Measured:
        rows = self.trainer.measured()
        losses, norms = [row[0] for row in rows], [row[1] for row in rows]
        stages: dict[str, tuple[bool, bool]] = {}
        for seed in self.trainer.kasmina.seeds:
            young, old = stages.get(seed.site, (False, False))
            stages[seed.site] = (young or seed.on_probation, old or not seed.on_probation)
        return Measured(
            train_loss=statistics.fmean(losses),
            gradient_noise=statistics.pstdev(norms) / statistics.fmean(norms) if len(norms) > 1 else None,
            norms=self._norms,
            stages=stages,
            contributions=self._contributions(len(rows)),
        )

    def _contributions(self, steps: int) -> dict[str, float]:
        """Site → its newest seed's last measured value; the stalest are measured again, within `CONTRIBUTION_SHARE`."""
        newest = {seed.site: seed.number for seed in self.trainer.kasmina.seeds}
        known = {site: kept for site, kept in self._contributed.items() if newest.get(site) == kept[1]}
        # A forward pass is a third of a step's FLOPs: one pass with all seeds, one without each.
        cost = self.trainer.sample_tokens / self.tokens_per_step / 3
        paid_for = 0 if self.fraction() >= 1 else int(CONTRIBUTION_SHARE * steps / cost) - 1
        stalest = sorted(newest, key=lambda site: known[site][2] if site in known else -1)[: max(0, paid_for)]
        if stalest:
            begun = time.perf_counter()
            for site, value in self.trainer.contributions(stalest, self._pause).items():
                if math.isfinite(value):  # the network may diverge without the seed
                    known[site] = value, newest[site], self.sequence
            self._charge((1 + len(stalest)) * cost * self._step_seconds, begun)
        self._contributed = known
        return {site: kept[0] for site, kept in known.items()}

    def _roll_back(self, fault: str) -> None:
        """Return to the slice's start and drop the newest graft if on probation; the cost of training stays charged."""
        begun = time.perf_counter()
        kasmina = self.trainer.kasmina
        suspect = kasmina.seeds[-1] if kasmina.seeds and kasmina.seeds[-1].on_probation else None
        self.trainer.roll_back(self._good)
        if self.prunes and self.prunes[-1].decision == self.sequence:  # undone too
            self.prunes.pop()
            for number in self._planted():
                if self.grafts[number].outcome == "pruned":
                    self.grafts[number].outcome = None
        removed = None
        if suspect is not None:
            removed = f"{suspect.blueprint} at {suspect.site}"
            if suspect.number in self._planted():  # older than the slice
                self.trainer.kasmina.prune(suspect.site)
                self._good = self.trainer.state()
            self.grafts[suspect.number].outcome = "rolled back"
            until = self.clock.passed + 1 + self.spec.growth.lockout_decisions
            self.lockout.append((suspect.site, suspect.blueprint, until))
        self.rollbacks.append(Rollback(self.fraction(), self.sequence, self.ledger.steps, fault, removed))
        self._next_slice()
        self._resized()
        self._charge(self.spec.clock.graft_seconds, begun)
        self._strikes += 1
