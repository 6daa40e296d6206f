"""GrowthRun: one GPT's whole training run on text, as an episode. Pure Python and torch, no Ray.

`reset` and `step` are those of every run (`workers/episode.py`); here is what training adds: forks, the governor's
rollbacks, and saving.

A slice is trained, evaluated, and measured; then cooldowns are taken. It may be stopped between any two of the small
pieces of that, and goes on from there to the same numbers: what is done is told by the number of steps since the last
slice, and `_reached` once only cooldowns are left.
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
    """A GrowthRun but for its tensors; callers may keep keys of their own beside it."""

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

    Args:
        spec: what the run is.
        data: prepared shards.
        on_step: called with the run after each optimizer step, each part of an evaluation and each step of a copy, for
            progress; must be quick. What it raises stops the run there: `state` tells of that point, and `finish` goes
            on from it.

    Attributes:
        parameters: of the host now.
        tokens_per_step: tokens of one optimizer step.
        on_step: as given; may be changed.
    """

    def __init__(self, spec: RunSpec, data: TokenData, on_step: Callable[["GrowthRun"], None] | None = None) -> None:
        super().__init__(spec)
        self._data = data
        self.on_step = on_step
        self.tokens_per_step = batch_tokens(spec)
        self.trainer: Trainer  # made by reset

    # -- Copies ------------------------------------------------------------------------------------------------

    def fork(self) -> Self:
        """An independent copy in memory, at the same point, over the same text."""
        callback, self.on_step = self.on_step, None
        shared = {id(kept): kept for kept in (self._data, self._good, self.spec, self.observer)}  # nobody changes them
        try:
            return copy.deepcopy(self, shared)
        finally:
            self.on_step = callback

    def _trial(self) -> Self:
        """A fork that stops where this run is asked to."""
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
        """The loss that a run of a smaller budget would have ended at: a fork's, its rate let down from here on.

        The fork decays over as large a part of its budget as the run itself will: from fraction u on to
        u / `optimizer.decay_from`. Nothing is charged to this run. `val_loss` is None where the governor found a fault.
        """
        fork = self._trial()
        end = min(1.0, fork.fraction() / self.spec.optimizer.decay_from)
        fork._decay = (fork.fraction(), end)
        fault = fork._train_to(end * fork.clock.amount)
        fork.loss = fork._evaluate()
        sound = fault is None and math.isfinite(fork.loss)
        return {**fork._point(), "val_loss": fork.loss if sound else None}

    # -- Saving ------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Save as a file (`platform/checkpoint.py`)."""
        checkpoint.write(path, *self.state())

    @classmethod
    def restore(cls, path: Path, data: TokenData, on_step: Callable[["GrowthRun"], None] | None = None) -> "GrowthRun":
        """The run that `save` saved; on the CPU, by the reference clock, it goes on to the same numbers to the bit."""
        values, tensors = checkpoint.read(path)
        run = cls(RunState.checked(values, f"the checkpoint {path}").episode.spec, data, on_step)
        run.load(values, tensors)
        return run

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that `load` needs to go on to the same numbers, at any stop: JSON values, and tensors by name."""
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
        """Become the run whose `state` this is. This run must be of the same spec.

        Raises:
            UserError: the state was saved over other text or another tokenizer, or is none that a run can be in.
        """
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
            self.trainer.load(*snapshots["good"])  # only to see that a rollback can
        self.trainer.load(*snapshots["now"])
        self._good = snapshots.get("good", snapshots["now"])
        self._measured, self._contributed, self._norms = state.measured, state.contributed, state.norms
        self._governor.window = state.window
        self._checked, self._strikes, self._reached = state.checked_steps, state.strikes, state.reached
        self._resized()
        self.telemetry = self._look()

    # -- Episode -----------------------------------------------------------------------------------------------

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

    # -- Training ----------------------------------------------------------------------------------------------

    def _train_soundly(self, boundary: float) -> float:
        """Train to a reading, and the loss there; what goes wrong on the way is undone, three times at most."""
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
        """Train to a reading, one step of the slice at least; returns the governor's fault, where it finds one."""
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
        """The host's rate now; a seed counts towards the size as it warms up, so the rate glides to the new size's."""
        size = self._parameters_non_embedding - self.trainer.kasmina.parameters_warming_up()
        return rate(self.spec.optimizer, self.fraction(), size, self._decay)

    def _resized(self) -> None:
        """Note what a step costs at the shape now."""
        shape = self._shape()
        self._is_split = self.trainer.host.split()
        self.parameters = shape.parameters_count()
        self._parameters_non_embedding = shape.parameters_count(non_embedding=True)
        self._flops = self.tokens_per_step * shape.flops_per_token()
        self._step_seconds = self.spec.clock.step_seconds(shape, self.tokens_per_step, split=self._is_split)

    def _charge(self, predicted: float, begun: float, steps: int = 0, *, wait: bool = True) -> None:
        """Charge what was done since `begun`, waiting for the device first."""
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

    # -- What a slice ends with --------------------------------------------------------------------------------

    def _next_slice(self) -> None:
        """Nothing has been trained of it yet; note which grafts have left probation."""
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
        """Of each site's newest seed, as last measured; those measured longest ago are measured anew.

        As many as a slice of `steps` optimizer steps can pay for: only a controller reads them, so they are charged.
        """
        newest = {seed.site: seed.number for seed in self.trainer.kasmina.seeds}
        known = {site: kept for site, kept in self._contributed.items() if newest.get(site) == kept[1]}
        # A forward pass is a third of a step's FLOPs; there is one with every seed, and one without each.
        cost = self.trainer.sample_tokens / self.tokens_per_step / 3
        paid_for = 0 if self.fraction() >= 1 else int(CONTRIBUTION_SHARE * steps / cost) - 1
        stalest = sorted(newest, key=lambda site: known[site][2] if site in known else -1)[: max(0, paid_for)]
        if stalest:
            begun = time.perf_counter()
            for site, value in self.trainer.contributions(stalest, self._pause).items():
                if math.isfinite(value):  # without the seed the network may be broken: then nothing was measured
                    known[site] = value, newest[site], self.sequence
            self._charge((1 + len(stalest)) * cost * self._step_seconds, begun)
        self._contributed = known
        return {site: kept[0] for site, kept in known.items()}

    # -- Rollback ----------------------------------------------------------------------------------------------

    def _roll_back(self, fault: str) -> None:
        """Go back to the start of this slice, without the newest graft if it is still on probation.

        What training has cost stays charged. Batches and dropout come again as they came, for each depends on the
        step's number alone.
        """
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
            if suspect.number in self._planted():  # it is older than the slice
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
