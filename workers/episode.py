"""An episode: one host's training run, decision by decision, whatever does the training.

`Episode` keeps the ledger, the decision clock, the reward and the records, and leaves five things to what trains:
starting, growing, training to a reading, evaluating and measuring. `GrowthRun` does them with torch on text,
`SurrogateRun` by a formula.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

from esper.platform.budget import DecisionClock
from esper.platform.contracts import GraftAction, HostShape, Instance, Transition
from esper.platform.errors import UserError
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate, Telemetry
from esper.workers.candidates import Option, options, telemetry_space
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.observe import Measured, Moment, batch_tokens, observe


class Episode(ABC):
    """The Run contract but for the training itself.

    Attributes:
        spec: what the run is.
        ledger: what it has used so far.
        curve: a point per decision, the first at budget fraction 0 (`summary.json`'s `val_curve`).
        grafts: a record per graft (`summary.json`'s `grafts`).
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.space = telemetry_space(spec)
        self.blueprints = make_blueprints(spec.growth.blueprints)
        self.ledger = Ledger()
        self.curve: list[dict[str, float]] = []
        self.grafts: list[dict[str, Any]] = []

    # -- What trains ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _start(self) -> None:
        """Make the host of `self.instance` from `self.seed`."""

    @abstractmethod
    def _shape(self) -> HostShape:
        """The host's shape now."""

    @abstractmethod
    def _graft(self, site: str, blueprint: str) -> float:
        """Grow, charge the ledger, and return the validation loss right after, in nats."""

    @abstractmethod
    def _train(self, boundary: float) -> None:
        """Do at least one optimizer step, and stop at the first whose reading is at or past `boundary`."""

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

    # -- Run -----------------------------------------------------------------------------------------------------

    def reset(self, instance: Instance | None = None, seed: int = 0) -> Telemetry:
        """Start an episode: the first observation, at budget fraction 0."""
        self.instance = instance or Instance()
        self.seed = seed
        self.ledger = Ledger()
        budget = self.spec.budget
        self.clock = DecisionClock(budget.amount * self.instance.budget, budget.decisions)
        self.curve, self.grafts = [], []
        self._grafted: list[tuple[int, str]] = []  # (boundaries passed, site) of each graft
        self.diverged = False
        self._sequence = 0
        self._start()
        self._start_shape = self._shape()
        self.reference = self._reference()
        self.loss = self._evaluate()
        return self._observe()

    def step(self, action: GraftAction) -> Transition:
        """Apply the action, train to the next decision, evaluate.

        Raises:
            UserError: the action answers an older observation or is not legal; nothing has been changed then.
        """
        candidate = self._accept(action)
        loss_before, cost_before = self.loss, self.ledger.parameter_seconds
        if candidate.operation == "graft":
            self._apply(candidate, action.reason)
        self._train(self.clock.boundary)
        self.clock.advance(self.reading())
        self._sequence += 1
        self.loss = self._evaluate()
        rented = self.ledger.parameter_seconds - cost_before
        if not math.isfinite(self.loss):  # the rent that the run does not pay is charged, the loss is chance level
            self.diverged = True
            self.loss = max(loss_before, math.log(self._vocab_size()))
            rented += self._unpaid()
        telemetry = self._observe()
        reward = (loss_before - self.loss) - self.spec.reward.rent * rented / self.reference
        terminated = self.clock.spent or self.diverged
        info: dict[str, Any] = {"point": self.curve[-1]}
        if terminated:
            info["summary"] = self.summary()
        return Transition(telemetry, reward, terminated, info=info)

    def summary(self) -> dict[str, Any]:
        """Where the run stands: final loss, sizes, every ledger axis, curve and grafts, as plain JSON values."""
        shape = self._shape()
        return {
            "seed": self.seed,
            "preset": self.spec.preset,
            "val_loss": self.loss,
            "perplexity": perplexity(self.loss),
            "diverged": self.diverged,
            "parameters": shape.parameters_count(),
            "parameters_non_embedding": shape.parameters_count(non_embedding=True),
            "layers": shape.depth(),
            **self.ledger.as_dict(),
            "clock": self.spec.clock.kind,
            "budget": {"axis": self.spec.budget.axis, "amount": self.clock.amount},
            "decisions": self._sequence,
            "grafts": list(self.grafts),
            "val_curve": list(self.curve),
        }

    # -- Where it stands -----------------------------------------------------------------------------------------

    def reading(self) -> float:
        """What the run has used on its budget's axis."""
        return self.ledger.read(self.spec.budget.axis)

    def fraction(self) -> float:
        """Fraction of the budget spent."""
        return self.clock.fraction(self.reading())

    def options(self) -> tuple[Option, ...]:
        """Every candidate at the shape now."""
        return options(self._shape(), tuple(self.blueprints.values()))

    # -- Helpers -------------------------------------------------------------------------------------------------

    def _accept(self, action: GraftAction) -> Candidate:
        if self.clock.spent or self.diverged:
            raise UserError("the episode has ended: call reset before step.")
        if action.sequence != self._sequence:
            raise UserError(
                f"the action answers observation {action.sequence}, but the last one is {self._sequence}: "
                "a late reply is refused."
            )
        if not (0 <= action.index < len(self._last.actions) and self._last.mask[action.index]):
            legal = ", ".join(str(self._last.actions[i]) for i in self._last.legal())
            raise UserError(f"action {action.index} is not legal here: the legal ones are {legal}.")
        return self._last.actions[action.index]

    def _apply(self, candidate: Candidate, reason: str) -> None:
        assert candidate.site is not None
        assert candidate.blueprint is not None
        before = self._shape().parameters_count()
        fraction = self.fraction()
        loss_after = self._graft(candidate.site, candidate.blueprint)
        self._grafted.append((self.clock.passed, candidate.site))
        self.grafts.append(
            {
                "budget_fraction": fraction,
                "decision": self._sequence,
                "optimizer_step": self.ledger.steps,
                "site": candidate.site,
                "blueprint": candidate.blueprint,
                "parameters_before": before,
                "parameters_after": self._shape().parameters_count(),
                "val_loss_before": self.loss,
                "val_loss_after": loss_after,
                "reason": reason,
            }
        )

    def _observe(self) -> Telemetry:
        shape, fraction = self._shape(), self.fraction()
        ledger = self.ledger.as_dict()
        self.curve.append(
            {
                "budget_fraction": fraction,
                **{k: ledger[k] for k in ("steps", "tokens", "flops", "seconds", "wall_seconds", "parameter_seconds")},
                "parameters": shape.parameters_count(),
                "val_loss": self.loss,
            }
        )
        moment = Moment(
            sequence=self._sequence,
            decision=self.clock.passed,
            decisions=self.clock.decisions,
            budget_used=fraction,
            decaying=fraction >= self.spec.optimizer.decay_from,
            tokens=self.ledger.tokens,
            vocab_size=self._vocab_size(),
            start=self._start_shape,
            shape=shape,
            split=self._split(),
            losses=[(point["budget_fraction"], point["val_loss"]) for point in self.curve],
            grafts=self._grafted,
            budget=self.clock.amount,
            reference=self.reference,
        )
        self._last = observe(self.spec, self.space, moment, self.options(), self._measure())
        return self._last

    def _reference(self) -> float:
        """Parameter-seconds that cost `reward.rent` nats."""
        if self.spec.reward.reference is not None:
            return self.spec.reward.reference
        if self.spec.budget.axis == "parameter_seconds":
            return self.clock.amount
        return self._cost_of(self.clock.amount, self._start_shape)

    def _unpaid(self) -> float:
        """Parameter-seconds that the rest of the budget would cost at the size now."""
        return self._cost_of(max(0.0, self.clock.amount - self.reading()), self._shape())

    def _cost_of(self, amount: float, shape: HostShape) -> float:
        """Predicted parameter-seconds of `amount` on the budget's axis at a shape."""
        tokens, clock = batch_tokens(self.spec), self.spec.clock
        split = self._split()
        steps = amount / clock.axis_per_step(self.spec.budget.axis, shape, tokens, split=split)
        return steps * clock.step_seconds(shape, tokens, split=split) * shape.parameters_count()


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats per token; a loss past 50 nats says nothing more."""
    return math.exp(min(loss, 50.0))
