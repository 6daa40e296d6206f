"""GrowthRun: one GPT's whole training run on text, as an episode. Pure Python and torch, no Ray.

`reset` and `step` are those of every run (`workers/episode.py`); here is what training adds: forks, the governor's
rollbacks, and saving.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.contracts import GraftAction, HostShape, Instance
from esper.platform.errors import UserError
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.workers.candidates import Planted
from esper.workers.episode import Episode, as_json
from esper.workers.kasmina.governor import CHECK_EVERY, Governor
from esper.workers.observe import Measured, batch_tokens
from esper.workers.tolaria.data import TokenData
from esper.workers.tolaria.device import synchronize
from esper.workers.tolaria.rate import rate
from esper.workers.tolaria.trainer import Trainer

CONTRIBUTION_SHARE = 0.02  # of a slice's steps that measuring contributions may cost
STRIKES = 3  # faults in a row, without a sound decision between them, that end a run

Snapshot = tuple[dict[str, Any], dict[str, Tensor]]
"""A trainer's state, never changed once taken: JSON values and tensors by name."""


class GrowthRun(Episode):
    """An episode that trains a host.

    Args:
        spec: what the run is.
        data: prepared shards.
        on_step: called between two optimizer steps, for progress; must be quick. What it raises stops the run there:
            `state` tells of that point, and `finish` goes on from it.

    Attributes:
        parameters: of the host now.
        tokens_per_step: tokens of one optimizer step.
        on_step: as given; may be changed.
    """

    def __init__(self, spec: RunSpec, data: TokenData, on_step: Callable[["GrowthRun"], None] | None = None) -> None:
        super().__init__(spec)
        self._data = data
        self.on_step = on_step
        self.trainer: Trainer  # made by reset

    # -- Copies ------------------------------------------------------------------------------------------------

    def fork(self) -> Self:
        """An independent copy in memory, at the same point, over the same text."""
        callback, self.on_step = self.on_step, None
        shared = {id(kept): kept for kept in (self._data, self._good)}  # nobody changes them
        try:
            return copy.deepcopy(self, shared)
        finally:
            self.on_step = callback

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> tuple[np.ndarray, list[Ledger]]:
        """What each action leads to from here on the same batches, tried on forks.

        Returns:
            Training losses, float64 (len(actions), optimizer_steps), and each twin's ledger after.
        """
        losses, ledgers = [], []
        for action in actions:
            twin = self.fork()
            candidate = twin._accept(action)
            twin._change(candidate)
            twin.trainer.forget()
            for _ in range(optimizer_steps):
                twin._optimizer_step()
            losses.append([row[0] for row in twin.trainer.measured()])
            ledgers.append(twin.ledger)
        return np.array(losses), ledgers

    def cooldown(self) -> dict[str, float | None]:
        """The loss that a run of a smaller budget would have ended at: a fork's, its rate let down from here on.

        The fork decays over as large a part of its budget as the run itself will: from fraction u on to
        u / `optimizer.decay_from`. Nothing is charged to this run.

        Returns:
            The fork's point: `budget_fraction` (of this run's budget), ledger axes, `parameters`, and `val_loss`, None
            where the governor would have stopped it.
        """
        fork = self.fork()
        end = min(1.0, fork.fraction() / self.spec.optimizer.decay_from)
        fork._decay = (fork.fraction(), end)
        fault = fork._train_to(end * fork.clock.amount)
        fork.loss = fork._evaluate()
        sound = fault is None and math.isfinite(fork.loss)
        return {**fork._point(), "val_loss": fork.loss if sound else None}

    # -- Saving ------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Save as a file, whole or not at all (`platform/checkpoint.py`)."""
        checkpoint.write(path, *self.state())

    @classmethod
    def restore(
        cls, folder: Path, data: TokenData, on_step: Callable[["GrowthRun"], None] | None = None
    ) -> "GrowthRun":
        """The run that `save` saved; on the CPU, by the reference clock, it goes on to the same numbers to the bit.

        Raises:
            UserError: the folder is damaged, or was saved over other text or another tokenizer.
        """
        values, tensors = checkpoint.read(folder)
        run = cls(RunSpec.checked(values["books"]["spec"], str(folder)), data, on_step)
        run.load(values, tensors)
        return run

    def state(self) -> Snapshot:
        """All that `load` needs to go on to the same numbers, between any two optimizer steps: JSON values, tensors."""
        now = self.trainer.state() if self.unfinished else self._good
        values, tensors = {"now": now[0]}, {f"now/{name}": tensor for name, tensor in now[1].items()}
        if now is not self._good:
            values["good"] = self._good[0]
            tensors |= {f"good/{name}": tensor for name, tensor in self._good[1].items()}
        return as_json(
            {
                "data": self._data.manifest.fingerprint(),
                "books": self.books(),
                "trainer": values,
                "measured": self._measured.as_dict(),
                "contributed": self._contributed,
                "governor": self._governor.state(),
                "checked": self._checked,
                "strikes": self._strikes,
            }
        ), tensors

    def load(self, values: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Become the run whose `state` this is. This run must be of the same spec.

        Raises:
            UserError: the state was saved over other text or another tokenizer.
        """
        if values["data"] != self._data.manifest.fingerprint():
            raise UserError(
                "the checkpoint was saved over other text or another tokenizer than the data given: give it the same."
            )
        books = values["books"]
        self._begin(Instance.model_validate(books["instance"]), books["seed"])
        self._load_books(books)
        self._measured = Measured(**values["measured"])
        snapshots: dict[str, Snapshot] = {
            place: (
                saved,
                {key.removeprefix(f"{place}/"): t for key, t in tensors.items() if key.startswith(f"{place}/")},
            )
            for place, saved in values["trainer"].items()
        }
        self.trainer.load(*snapshots["now"])
        self._good = snapshots.get("good", snapshots["now"])
        self._contributed = {site: tuple(kept) for site, kept in values["contributed"].items()}
        self._governor.load(values["governor"])
        self._checked, self._strikes = values["checked"], values["strikes"]
        self._resized()
        self.telemetry = self._look()

    # -- Episode -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.trainer = Trainer(self.spec, self._data, self.blueprints, self.seed, self.instance)
        self._measured = Measured()
        self._decay: tuple[float, float] | None = None  # of a cooldown fork: where its rate starts and ends to fall
        self._governor = Governor(self._vocab_size())
        self._checked = 0  # steps of this slice that the governor has looked at
        self._strikes = 0
        self._contributed: dict[str, tuple[float, int, int]] = {}  # site → (value, number of its seed, decision)
        self._good: Snapshot = self.trainer.state()  # as the slice under way began, before its action
        self._resized()

    def _shape(self) -> HostShape:
        return self.trainer.host.shape

    def _split(self) -> bool:
        return self._is_split

    def _point(self) -> dict[str, float]:
        return {**super()._point(), "learning_rate": self._rate()}

    def _vocab_size(self) -> int:
        return self._data.manifest.vocab_size

    def _newest(self) -> tuple[Planted, ...]:
        newest = {seed.site: seed for seed in self.trainer.kasmina.seeds}
        return tuple(Planted(seed.site, seed.blueprint, seed.units, seed.part) for seed in newest.values())

    def _graft(self, site: str, blueprint: str) -> None:
        self._surgery(lambda: self.trainer.kasmina.graft(site, blueprint))

    def _prune(self, seed: Planted) -> None:
        self._surgery(lambda: self.trainer.kasmina.prune(seed.site))

    def _surgery(self, change: Callable[[], object]) -> None:
        """Change the host, and charge one graft."""
        begun = time.perf_counter()
        change()
        synchronize(self.trainer.device)
        self._resized()
        self._charge(self.spec.clock.graft_seconds, time.perf_counter() - begun)

    def _train(self, boundary: float) -> float:
        struck = False
        while True:
            fault = self._train_to(boundary)
            loss = self._evaluate() if fault is None else math.nan
            if fault is None and math.isfinite(loss):
                break
            struck = True
            self._roll_back(fault or "the validation loss was not finite")
            if self.failure is not None:
                return self._evaluate()
        self._strikes = self._strikes if struck else 0
        self._measured = self._take_measures()
        self.trainer.forget()
        self._checked = 0
        self._settle_grafts()
        self._good = self.trainer.state()
        self._take_cooldowns()
        return loss

    def _evaluate(self) -> float:
        begun = time.perf_counter()
        loss = self.trainer.evaluate()
        self.ledger.validation_seconds += time.perf_counter() - begun
        return loss

    def _measure(self) -> Measured:
        return self._measured

    # -- Training ----------------------------------------------------------------------------------------------

    def _train_to(self, boundary: float) -> str | None:
        """Train to a reading; returns the fault that the governor found, where it did."""
        while True:
            self._optimizer_step()
            done = self.reading() >= boundary
            if done or self.trainer.unread - self._checked >= CHECK_EVERY:
                fault = self._governor.fault(self.trainer.measured(since=self._checked))
                if fault is not None:
                    return fault
                self._checked = self.trainer.unread
            if done:
                break
            if self.on_step is not None:
                self.on_step(self)
        if self.spec.clock.kind != "wall":  # which waits at every step: here the rest of the slice is waited for
            begun = time.perf_counter()
            synchronize(self.trainer.device)
            self.ledger.wall_seconds += time.perf_counter() - begun
        return None

    def _optimizer_step(self) -> None:
        begun = time.perf_counter()
        self.trainer.step(self._rate())
        if self.spec.clock.kind == "wall":
            synchronize(self.trainer.device)
        self._charge(self._step_seconds, time.perf_counter() - begun, steps=1)
        if self.trainer.kasmina.due:
            begun = time.perf_counter()
            fused = self.trainer.kasmina.fuse()
            synchronize(self.trainer.device)
            self._charge(len(fused) * self.spec.clock.fuse_seconds, time.perf_counter() - begun)
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

    # -- What a slice ends with --------------------------------------------------------------------------------

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
            norms=self.trainer.site_norms(),
            stages=stages,
            contributions=self._contributions(len(rows)),
        )

    def _contributions(self, steps: int) -> dict[str, float]:
        """Of each site's newest seed, as last measured; those measured longest ago are measured anew.

        As many as a slice of `steps` optimizer steps can pay for: only a controller reads them, so they are charged.
        """
        kasmina = self.trainer.kasmina
        newest = {seed.site: seed.number for seed in kasmina.seeds}
        known = {site: kept for site, kept in self._contributed.items() if newest.get(site) == kept[1]}
        # A forward pass is a third of a step's FLOPs; there is one with every seed, and one without each.
        cost = self.trainer.sample_tokens / self.tokens_per_step / 3
        affordable = 0 if self.fraction() >= 1 else int(CONTRIBUTION_SHARE * steps / cost) - 1
        stalest = sorted(newest, key=lambda site: known[site][2] if site in known else -1)[: max(0, affordable)]
        if stalest:
            begun = time.perf_counter()
            for site, value in self.trainer.contributions(stalest).items():
                if math.isfinite(value):  # without the seed the network may be broken: then nothing was measured
                    known[site] = value, newest[site], self._sequence
            self._charge((1 + len(stalest)) * cost * self._step_seconds, time.perf_counter() - begun)
        self._contributed = known
        return {site: kept[0] for site, kept in known.items()}

    def _settle_grafts(self) -> None:
        """Note which grafts have left probation."""
        for site in {seed.site for seed in self.trainer.kasmina.seeds}:
            seed = self.trainer.kasmina.newest(site)
            if seed is not None and not seed.on_probation:
                self._settle(site, "kept")

    def _take_cooldowns(self) -> None:
        for at in self.spec.budget.cooldowns[len(self.annealed) :]:
            if self.fraction() < at * self.spec.optimizer.decay_from:
                break
            self.annealed.append(self.cooldown())

    # -- Rollback ----------------------------------------------------------------------------------------------

    def _roll_back(self, fault: str) -> None:
        """Go back to the start of this slice, without the newest graft if it is still on probation.

        What training has cost stays charged. Batches and dropout come again as they came, for each depends on the
        step's number alone.
        """
        begun = time.perf_counter()
        suspect = self.trainer.kasmina.seeds[-1] if self.trainer.kasmina.seeds else None
        self.trainer.load(*self._good)
        removed = None
        if suspect is not None and suspect.on_probation:
            removed = f"{suspect.blueprint} at {suspect.site}"
            if any(seed.number == suspect.number for seed in self.trainer.kasmina.seeds):  # it is older than the slice
                self.trainer.kasmina.prune(suspect.site)
                self._good = self.trainer.state()
            self._settle(suspect.site, "rolled back")
            self._cool(suspect.site, suspect.blueprint)
        if self.prunes and self.prunes[-1]["decision"] == self._sequence:  # undone too
            self._settle(self.prunes.pop()["site"], None, of=("pruned",))
        self.rollbacks.append(
            {
                "budget_fraction": self.fraction(),
                "decision": self._sequence,
                "optimizer_step": self.ledger.steps,
                "fault": fault,
                "removed": removed,
            }
        )
        self.trainer.forget()
        self._checked = 0
        synchronize(self.trainer.device)
        self._resized()
        self._charge(self.spec.clock.graft_seconds, time.perf_counter() - begun)
        self._strikes += 1
        if self._strikes >= STRIKES:
            self.failure = f"{fault}, {STRIKES} times in a row"
