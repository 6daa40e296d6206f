"""GrowthRun: an episode (`workers/episode.py`) that trains a GPT on text, with forks, rollbacks and saving. No Ray.

A slice is trained, evaluated and measured, then cooldowns run. It can stop at any `_pause` and resume to the same
numbers: progress is the count of unread steps, then `reached` once only cooldowns are left.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as File
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field
from torch import Tensor

from esper.platform.console import say
from esper.platform.contracts import GraftAction
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate
from esper.workers.episode import Finite, Point
from esper.workers.kasmina.governor import CHECK_EVERY
from esper.workers.kasmina.registry import Natural
from esper.workers.observe import norm_fields
from esper.workers.tolaria import compiled
from esper.workers.tolaria.data import Data, TokenData
from esper.workers.tolaria.export import host_of
from esper.workers.tolaria.rate import rate
from esper.workers.tolaria.sampling import sample
from esper.workers.tolaria.trainer import Trainer, TrainerState, synchronize, within
from esper.workers.trained import STRIKES, TrainedEpisode, TrainedState

CONTRIBUTION_SHARE = 0.02  # of a slice's steps that measuring contributions may cost
IDENTITY = 1e-4  # largest change of a logit that proves a graft harmless: it moves a token's loss by at most twice that
WAITED = 0.1  # seconds between two looks at a build

OnStep = Callable[["GrowthRun"], None]
Path = Literal["eager", "building", "compiled"]  # by which a slice's steps go; "building" ones are eager still


class RunState(TrainedState):
    """A GrowthRun's own attributes too."""

    contributed: dict[str, tuple[Finite, Natural, Natural]]
    norms: dict[str, tuple[Finite, Finite]]
    reached: Annotated[float, Field(gt=0)] | None
    path: Path
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None


class Trained(Frozen):
    """The rest of a saved GrowthRun, without its tensors."""

    model_config = ConfigDict(extra="ignore")

    data: str  # fingerprint of the text
    now: TrainerState
    good: TrainerState | None = None  # where it is another


class GrowthRun(TrainedEpisode):
    """An episode that trains a host.

    `on_step` is called with the run after each optimizer step (a copy's too) and each part of an evaluation. An
    exception from it stops the run there: `state` saves that point, and `finish` resumes from it. `weights` is the
    `model.safetensors` of a GPT-2 to start with, of the shape that the spec tells.
    """

    State = RunState

    def __init__(self, spec: RunSpec, data: Data, on_step: OnStep | None = None, weights: File | None = None) -> None:
        super().__init__(spec, data.manifest.vocab_size)
        self._data, self._weights = data, weights
        self.on_step = on_step
        self.trainer: Trainer  # made by reset

    def fork(self) -> Self:
        """An independent copy in memory over the same text, which calls this run's `on_step` with this run."""
        own, self.on_step = self.on_step, None
        never_changed = (self._data, self._good, self.spec, self.observer, self.layout)
        fork = copy.deepcopy(self, {id(kept): kept for kept in never_changed})
        self.on_step = own
        fork.on_step = lambda _: self._pause()
        return fork

    def cooldown(self) -> Point:
        """Estimates the final loss of a smaller budget: a fork's rate decays from here; this run is not charged.

        At budget fraction u the fork decays until u / `optimizer.decay_from`. `val_loss` is on the whole held-out set,
        to be compared with final losses; None after a fault.
        """
        fork = self.fork()
        end = min(1.0, fork.fraction() / self.spec.optimizer.decay_from)
        fork._decay = (fork.fraction(), end)
        wrong = fork._train_to(end * fork.clock.amount)
        loss = fork._evaluate(whole=True)
        return {**fork._point(), "val_loss": loss if wrong is None and math.isfinite(loss) else None}

    def sample(self, tokens: int) -> str | None:
        if self.failure is not None or not isinstance(self._data, TokenData):
            return None
        return sample(host_of(*self.state()), self._data.tokenizer, tokens=tokens, seed=self.seed)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        snapshots = {"now": self.trainer.state(), "good": self._good} if self.unfinished else {"now": self._good}
        trainers = {place: kept[0] for place, kept in snapshots.items()}
        trained = Trained(data=self._data.manifest.fingerprint(), **trainers)
        tensors = {f"{place}/{name}": tensor for place, kept in snapshots.items() for name, tensor in kept[1].items()}
        return super().state()[0] | trained.model_dump(mode="json"), tensors

    def _restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        saved = Trained.checked(values, "the checkpoint")
        if saved.data != self._data.manifest.fingerprint():
            raise UserError("the checkpoint is of a run on other data, or text by another tokenizer: give it the same.")
        now, good = saved.now, saved.good or saved.now
        if not good.grafts <= now.grafts == len(self.grafts) or self.strikes > len(self.rollbacks):
            raise ValueError("the trainer is not that of the episode")
        self._good = good, within("good/" if saved.good else "now/", tensors)
        self.trainer.load(*self._good)  # also to check that a rollback can
        if saved.good:
            self.trainer.load(now, within("now/", tensors))

    def _start(self) -> None:
        self.trainer = Trainer(self.spec, self._data, self.blueprints, self.seed, self.instance)
        if self._weights is not None:
            self.trainer.start_with(self._weights)
        self.norms: dict[str, tuple[float, float]] = {}  # at the last step of a slice
        self.reached: float | None = None  # loss at the end of a slice of which only cooldowns are left
        self.path: Path = "eager"
        self.accuracy: float | None = None  # in the last evaluation, of data that are told by it
        self.contributed: dict[str, tuple[float, int, int]] = {}  # site → (value, number of its seed, decision)
        self._decay: tuple[float, float] | None = None  # of a cooldown fork: where its rate starts and ends to fall
        super()._start()

    def _roll_back(self, wrong: str) -> None:
        super()._roll_back(wrong)
        self.path = "eager"

    def _point(self) -> Point:
        told = {} if self.accuracy is None else {"accuracy": self.accuracy}
        return {**super()._point(), "learning_rate": self._rate(), **told}

    def summary(self) -> dict[str, Any]:
        return super().summary() | ({} if self.accuracy is None else {"accuracy": self.accuracy})

    def _change(self, candidate: Candidate) -> None:
        if candidate.operation != "wait":
            self.path = "eager"
        super()._change(candidate)

    def _graft(self, candidate: Candidate) -> float | None:
        before = self._logits()
        self._change(candidate)
        moved = float((self._logits() - before).abs().max())
        return moved if moved <= IDENTITY else None  # NaN too is None

    def _logits(self) -> Tensor:
        begun = time.perf_counter()
        logits = self.trainer.logits()
        self.ledger.validation_seconds += time.perf_counter() - begun
        return logits

    def _tries(self, actions: Sequence[GraftAction], optimizer_steps: int) -> Iterator[tuple[list[float], Ledger]]:
        for action in actions:
            twin = self.fork()
            twin._change(twin._accept(action))
            twin.trainer.forget()
            for _ in range(optimizer_steps):
                twin._optimizer_step()
                twin._pause()
            yield [row[0] for row in twin.trainer.measured()], twin.ledger

    def _train(self, boundary: float) -> tuple[float, float]:
        if self.reached is None:
            loss = self._train_soundly(boundary)
            if self.strikes == STRIKES:
                whole = self._evaluate(whole=True)
                self.failure = f"{self.rollbacks[-1].fault}, {STRIKES} times in a row"  # last: it ends the episode
                return loss, whole
            self._sound(loss, self._site_measures())
            self.reached = loss
        for at in self.spec.budget.cooldowns[len(self.annealed) :]:
            if self.fraction() < at * self.spec.optimizer.decay_from:
                break
            self.annealed.append(self.cooldown())
        whole = self._evaluate(whole=True) if self.clock.ends(self.reading()) else self.reached
        loss, self.reached = self.reached, None
        return loss, whole

    def _evaluate(self, *, whole: bool = False) -> float:
        begun = time.perf_counter()
        loss = self.trainer.evaluate(self._pause, whole=whole)
        self.accuracy = self.trainer.accuracy
        self.ledger.validation_seconds += time.perf_counter() - begun
        return loss

    def _train_soundly(self, boundary: float) -> float:
        """Train to a reading and return the loss there; faults are rolled back, until there are `STRIKES` in a row."""
        while self.strikes < STRIKES:
            wrong = self._train_to(boundary)
            loss = math.nan if wrong else self._evaluate()
            if math.isfinite(loss):
                self._note_sound()
                return loss
            self._roll_back(wrong or "the validation loss was not finite")
        self._good = self.trainer.state()
        return self._evaluate()

    def _train_to(self, boundary: float) -> str | None:
        """Train to a reading, at least one step; returns the governor's fault, if any."""
        if self.trainer.unread == 0:
            self.path = self._next_path()
        if self.path == "compiled" and not self.trainer.bound:
            self._go_compiled()
        while self.trainer.unread == 0 or self.reading() < boundary:
            self._optimizer_step()
            done = self.reading() >= boundary
            if done or self.trainer.unread - self.inspected >= CHECK_EVERY:
                wrong = self._fault(self.trainer.unread)
                if wrong is not None:
                    return wrong
            if done:
                begun = time.perf_counter()
                synchronize(self.trainer.device)  # for the rest of the slice; the wall clock waits at every step
                self.ledger.wall_seconds += 0.0 if self.spec.clock.kind == "wall" else time.perf_counter() - begun
                self.norms = self.trainer.site_norms()
            self._pause()
        return None

    def _next_path(self) -> Path:
        """Of the slice that begins: by compiled steps if in the last one the host was as it is, without young seeds.

        By the reference clock spec and course alone decide: numbers do not depend on when a build ends.
        """
        package = self.trainer.package() if self.spec.trainer.compile != "off" else None
        if package is None:
            return "eager"
        if self.path != "eager":
            return "compiled"
        if self.spec.trainer.compile == "auto":  # a package that is there does not count
            steps = (self.clock.amount - self.reading()) / float(self.layout.axis_per_step[0])
            pays = compiled.pays(self.spec.clock, self.shape.depth(), self.layout.step_seconds, steps)
            if not pays or compiled.compiler() is None:
                return "eager"
        return "building" if package.building() or package.there else "eager"

    def _go_compiled(self) -> None:
        """Bind the compiled step; one that is being built is waited for by the reference clock, not by the wall's."""
        package, begun = self.trainer.package(), time.perf_counter()
        if package is None:
            self.path = "eager"
            return
        if package.building() and self.spec.clock.kind == "reference":
            say("waiting for a compiled step, which takes about a minute to build (not with trainer.compile=off)")
            while package.building():
                time.sleep(WAITED)
                self._pause()
            self.ledger.wall_seconds += time.perf_counter() - begun
        self.trainer.bind(package)
        if package.failed:
            self.path = "eager"
            why = f"{package.failure} says why; delete it to try again"
            told = why if package.failure.exists() else f"it took over {compiled.BUILD_LIMIT} s, or the cache is full"
            say(f"a compiled step could not be built, so such steps stay eager ({told})")

    def _pause(self) -> None:
        if self.on_step is not None:
            self.on_step(self)

    def _optimizer_step(self) -> None:
        begun = time.perf_counter()
        self.trainer.step(self._rate())
        self._charge(self.layout.step_seconds, begun, steps=1, wait=self.spec.clock.kind == "wall")

    def _rate(self) -> float:
        """The host's rate; a seed counts towards the size as it warms up, so the rate changes smoothly."""
        size = self.layout.non_embedding - self.trainer.kasmina.parameters_warming_up()
        return rate(self.spec.optimizer, self.fraction(), size, self._decay)

    def _site_measures(self) -> dict[str, dict[str, float]]:
        sites: dict[str, dict[str, float]] = {site: norm_fields(*norms) for site, norms in self.norms.items()}
        for site, value in self._contributions(self.trainer.unread).items():
            sites.setdefault(site, {}).update(contribution=value, contribution_measured=1.0)
        return sites

    def _contributions(self, steps: int) -> dict[str, float]:
        """Site → its newest seed's last measured value; the stalest are measured again, within `CONTRIBUTION_SHARE`."""
        newest = {seed.site: seed.number for seed in self.trainer.kasmina.seeds}
        known = {site: kept for site, kept in self.contributed.items() if newest.get(site) == kept[1]}
        # A forward pass is a third of a step's FLOPs: one pass with all seeds, one without each.
        cost = self.trainer.sample_tokens / self.tokens_per_step / 3
        paid_for = 0 if self.fraction() >= 1 else int(CONTRIBUTION_SHARE * steps / cost) - 1
        stalest = sorted(newest, key=lambda site: known[site][2] if site in known else -1)[: max(0, paid_for)]
        if stalest:
            begun = time.perf_counter()
            for site, value in self.trainer.contributions(stalest, self._pause).items():
                if math.isfinite(value):  # the network may diverge without the seed
                    known[site] = value, newest[site], self.sequence
            self._charge((1 + len(stalest)) * cost * self.layout.step_seconds, begun)
        self.contributed = known
        return {site: kept[0] for site, kept in known.items()}
