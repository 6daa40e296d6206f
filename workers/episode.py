"""An episode: one host's training run, decision by decision.

`Episode` keeps ledger, decision clock, reward and records. Subclasses start, change, train, evaluate and measure the
host: `GrowthRun` with torch on text, `SurrogateRun` by a formula.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from esper.platform.budget import DecisionClock
from esper.platform.contracts import GraftAction, HostShape, Instance, Transition
from esper.platform.errors import UserError
from esper.platform.ledger import AXES, Ledger
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate, Telemetry
from esper.workers.kasmina.registry import Planted
from esper.workers.observe import Layout, Measured, Observer, Standing
from esper.workers.records import Change, EpisodeState, Graft, Point, Rollback


class Episode(ABC):
    """The Run contract without the training."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.observer = Observer(spec)
        self.space, self.blueprints = self.observer.space, self.observer.blueprints
        self.telemetry: Telemetry  # the last observation
        self._clear()

    def _clear(self) -> None:
        self.ledger = Ledger()
        self.loss = math.inf  # at the last decision, nats per token
        self.curve: list[Point] = []  # a point per decision, the first at budget fraction 0
        self.grafts: list[Graft] = []
        self.prunes: list[Change] = []
        self.rollbacks: list[Rollback] = []
        self.annealed: list[Point] = []  # a point per cooldown
        self.failure: str | None = None  # why the run was given up
        self.grafted: list[tuple[int, str]] = []  # (boundaries passed, site) of each graft
        self.lockout: list[tuple[str, str, int]] = []  # (site, blueprint, boundary at which it is allowed again)
        self.unfinished = False  # a slice is under way: call `finish`, not `step`
        self.paid = 0.0  # parameter-seconds whose rent rewards have charged
        self.sequence = 0  # number of the last observation

    @abstractmethod
    def _start(self) -> None:
        """Make the host of `self.instance` from `self.seed`."""

    @abstractmethod
    def _shape(self) -> HostShape:
        """The host's shape now."""

    @abstractmethod
    def _change(self, candidate: Candidate) -> None:
        """Graft, or prune a site's newest seed, and charge the ledger; WAIT changes nothing."""

    @abstractmethod
    def _planted(self) -> dict[int, Planted]:
        """Graft number → seed on the host, oldest graft first."""

    @abstractmethod
    def _train(self, boundary: float) -> float:
        """Train one step or more until `boundary`; returns the validation loss in nats, sets `failure` to give up."""

    @abstractmethod
    def _evaluate(self) -> float:
        """Validation loss on the fixed held-out set, nats per token."""

    @abstractmethod
    def _measure(self) -> Measured:
        """What the last slice measured."""

    @abstractmethod
    def _split(self) -> bool:
        """Whether some seed's segments are separate tensors."""

    @abstractmethod
    def _vocab_size(self) -> int:
        """Tokens in the vocabulary."""

    @abstractmethod
    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> tuple[np.ndarray, list[Ledger]]:
        """Try each action on a copy, on the same batches: losses, float64 (actions, steps), and the copies' ledgers."""

    def reset(self, instance: Instance | None = None, seed: int = 0) -> Telemetry:
        """Start an episode; returns the first observation, at budget fraction 0."""
        self._begin(instance or Instance(), seed)
        self.loss = self._evaluate()
        return self._observe()

    def _begin(self, instance: Instance, seed: int) -> None:
        self.instance, self.seed = instance, seed
        self.clock = DecisionClock(self.spec.budget.amount * instance.budget, self.spec.budget.decisions)
        self._clear()
        self._start()
        self._start_shape = self._shape()
        self.reference = self._reference()

    def step(self, action: GraftAction) -> Transition:
        """Apply the action and `finish`; UserError, and no change, for an illegal or late action."""
        candidate = self._accept(action)
        self.unfinished = True
        if candidate.operation != "wait":
            self._apply(candidate, action.reason)
        return self.finish()

    @property
    def ended(self) -> bool:
        """Whether the budget is spent or the run was given up."""
        return self.clock.spent or self.failure is not None

    def finish(self) -> Transition:
        """Train to the next decision: the rest of an interrupted `step`."""
        for change in (*self.grafts[-1:], *self.prunes[-1:]):
            if change.decision == self.sequence and change.val_loss_after is None:
                change.val_loss_after = _finite(self._evaluate())
        loss_before = self.loss
        self.loss = self._train(self.clock.boundary)
        self.clock.advance(self.reading())
        self.sequence += 1
        rented, self.paid = self.ledger.parameter_seconds - self.paid, self.ledger.parameter_seconds
        if self.failure is not None:  # a failed run pays the rest of its rent too
            rented += self._cost_of(max(0.0, self.clock.amount - self.reading()))
        self.unfinished = False
        for graft in self.grafts if self.ended else ():
            graft.outcome = graft.outcome or "on probation"
        telemetry = self._observe()
        reward = (loss_before - self.loss) - self.spec.reward.rent * rented / self.reference
        info: dict[str, Any] = {"point": self.curve[-1]}
        if self.ended:
            info["summary"] = self.summary()
        return Transition(telemetry, reward, self.ended, info=info)

    def summary(self) -> dict[str, Any]:
        """Loss, sizes, ledger axes, curve and changes so far, as JSON values."""
        shape = self._shape()
        return {
            "seed": self.seed,
            "preset": self.spec.preset,
            "val_loss": self.loss,
            "perplexity": perplexity(self.loss),
            "diverged": self.failure is not None,
            "failure": self.failure,
            "parameters": shape.parameters_count(),
            "parameters_non_embedding": shape.parameters_count(non_embedding=True),
            "layers": shape.depth(),
            "shape": shape.layers_as_json(),
            **self.ledger.as_dict(),
            "clock": self.spec.clock.kind,
            "budget": {"axis": self.spec.budget.axis, "amount": self.clock.amount},
            "decisions": self.sequence,
            "grafts": [asdict(graft) for graft in self.grafts],
            "prunes": [asdict(prune) for prune in self.prunes],
            "rollbacks": [asdict(rollback) for rollback in self.rollbacks],
            "annealed": list(self.annealed),
            "val_curve": list(self.curve),
        }

    def _episode_state(self) -> EpisodeState:
        values = {name: getattr(self, name) for name in EpisodeState.model_fields if name != "passed"}
        return EpisodeState(passed=self.clock.passed, **values)

    def _load_episode(self, state: EpisodeState) -> None:
        if state.spec != self.spec:
            raise UserError("the checkpoint is of a run of another spec: go on with the spec that it was saved with.")
        self._begin(state.instance, state.seed)
        for name in set(EpisodeState.model_fields) - {"spec", "passed"}:
            setattr(self, name, getattr(state, name))
        self.clock.passed = state.passed

    def reading(self) -> float:
        """The amount used on the budget's axis."""
        return self.ledger.read(self.spec.budget.axis)

    def fraction(self) -> float:
        """Fraction of the budget spent."""
        return self.clock.fraction(self.reading())

    def expected_seconds(self) -> float:
        """Predicted seconds until the next decision at the current size; 0 once ended."""
        layout, left = self._layout(), max(0.0, self.clock.boundary - self.reading())
        return 0.0 if self.ended else left / float(layout.axis_per_step[0]) * layout.step_seconds

    def _layout(self) -> Layout:
        newest = {seed.site: seed for seed in self._planted().values()}
        return self.observer.layout(self._shape(), tuple(newest.values()), self._split(), self._start_shape)

    def _accept(self, action: GraftAction) -> Candidate:
        if self.ended:
            raise UserError("the episode has ended: call reset before step.")
        if action.sequence != self.sequence:
            raise UserError(
                f"the action answers observation {action.sequence}, but the last one is {self.sequence}: "
                "a late reply is refused."
            )
        if not (0 <= action.index < len(self.telemetry.actions) and self.telemetry.mask[action.index]):
            legal = ", ".join(str(self.telemetry.actions[i]) for i in self.telemetry.legal())
            raise UserError(f"action {action.index} is not legal here: the legal ones are {legal}.")
        return self.telemetry.actions[action.index]

    def _apply(self, candidate: Candidate, reason: str) -> None:
        before, there = self._shape().parameters_count(), self._planted()
        values: dict[str, Any] = {
            "budget_fraction": self.fraction(),
            "decision": self.sequence,
            "optimizer_step": self.ledger.steps,
            "site": candidate.site,
            "blueprint": candidate.blueprint,
            "parameters_before": before,
            "val_loss_before": self.loss,
            "reason": reason,
        }
        self._change(candidate)
        values["parameters_after"] = self._shape().parameters_count()
        if candidate.operation == "graft":
            self.grafted.append((self.clock.passed, candidate.site or ""))
            self.grafts.append(Graft(**values))
        else:
            self.prunes.append(Change(**values))
            for number in there.keys() - self._planted().keys():  # the seed, and those inside it
                self.grafts[number].outcome = "pruned"

    def _observe(self) -> Telemetry:
        self.curve.append(self._point())
        self.telemetry = self._look()
        return self.telemetry

    def _point(self) -> Point:
        axes = {axis: getattr(self.ledger, axis) for axis in (*AXES, "wall_seconds")}
        parameters = self._layout().parameters
        return {"budget_fraction": self.fraction(), **axes, "parameters": parameters, "val_loss": self.loss}

    def _look(self) -> Telemetry:
        outcomes = {"kept": 1.0, "rolled back": -1.0}
        now = Standing(
            sequence=self.sequence,
            decision=self.clock.passed,
            decisions=self.clock.decisions,
            budget=self.clock.amount,
            budget_used=self.fraction(),
            tokens=self.ledger.tokens,
            vocab_size=self._vocab_size(),
            losses=self._seen(),
            grafts=self.grafted,
            outcome=outcomes.get(self.grafts[-1].outcome or "") if self.grafts else None,
            lockout={(site, blueprint) for site, blueprint, until in self.lockout if self.clock.passed < until},
            reference=self.reference,
        )
        return self.observer.observe(now, self._layout(), self._measure())

    def _seen(self) -> list[tuple[float, float]]:
        """(Budget fraction, validation loss) at each decision, as a controller sees them."""
        return [(point["budget_fraction"], point["val_loss"]) for point in self.curve]

    def _reference(self) -> float:
        """Parameter-seconds that cost `reward.rent` nats."""
        if self.spec.reward.reference is not None:
            return self.spec.reward.reference
        return self.clock.amount if self.spec.budget.axis == "parameter_seconds" else self._cost_of(self.clock.amount)

    def _cost_of(self, amount: float) -> float:
        """Predicted parameter-seconds of `amount` on the budget's axis at the current size."""
        layout = self._layout()
        return amount / float(layout.axis_per_step[0]) * layout.step_seconds * layout.parameters


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token, capped at 50 nats."""
    return math.exp(min(loss, 50.0))


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
