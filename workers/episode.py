"""An episode: one host's training run, decision by decision, whatever does the training.

`Episode` keeps the ledger, the decision clock, the reward and the records, and leaves to what trains: starting, growing
and pruning, training to a reading, evaluating and measuring. `GrowthRun` does them with torch on text,
`SurrogateRun` by a formula.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from esper.platform.budget import DecisionClock
from esper.platform.contracts import GraftAction, HostShape, Instance, Transition
from esper.platform.errors import UserError
from esper.platform.ledger import Ledger
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate, Telemetry
from esper.workers.candidates import Options, Planted, options, telemetry_space
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.observe import Measured, Moment, Priced, Pricing, batch_tokens, lay_out, observe

RECORDS = ("curve", "grafts", "prunes", "rollbacks", "annealed", "failure")


class Episode(ABC):
    """The Run contract but for the training itself.

    Attributes:
        spec: what the run is.
        ledger: what it has used so far.
        curve: a point per decision, the first at budget fraction 0 (`summary.json`'s `val_curve`).
        telemetry: the last observation.
        grafts: a record per graft (`summary.json`'s `grafts`); its `outcome` is null, kept, rolled back or pruned.
        prunes: a record per prune.
        rollbacks: a record per fault that the governor undid.
        annealed: a point per cooldown: the loss that a run of that budget would have ended at.
        failure: why the run was given up; None while it goes on.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.space = telemetry_space(spec)
        self.blueprints = make_blueprints(spec.growth.blueprints)
        self._pricing = Pricing.of(spec, self.space)
        self.ledger = Ledger()
        self._clear()

    def _clear(self) -> None:
        self.curve: list[dict[str, float]] = []
        self.grafts: list[dict[str, Any]] = []
        self.prunes: list[dict[str, Any]] = []
        self.rollbacks: list[dict[str, Any]] = []
        self.annealed: list[dict[str, float | None]] = []
        self.failure: str | None = None
        self._grafted: list[tuple[int, str]] = []  # (boundaries passed, site) of each graft
        self._lockout: dict[tuple[str, str], int] = {}  # (site, blueprint) → boundaries passed when it may come again
        self._slice: tuple[float, float] | None = None  # loss and parameter-seconds at the start of a slice under way
        self._sequence = 0
        self._last: Priced | None = None

    # -- What trains ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _start(self) -> None:
        """Make the host of `self.instance` from `self.seed`."""

    @abstractmethod
    def _shape(self) -> HostShape:
        """The host's shape now."""

    @abstractmethod
    def _graft(self, site: str, blueprint: str) -> None:
        """Grow, and charge the ledger."""

    @abstractmethod
    def _prune(self, seed: Planted) -> None:
        """Take a site's newest seed out, and charge the ledger."""

    @abstractmethod
    def _newest(self) -> tuple[Planted, ...]:
        """The newest seed of each site that has one."""

    @abstractmethod
    def _train(self, boundary: float) -> float:
        """Do at least one optimizer step, and stop at the first whose reading is at or past `boundary`.

        Returns:
            The validation loss there, nats per token. `failure` is set where the run had to be given up.
        """

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
        self._begin(instance or Instance(), seed)
        self.loss = self._evaluate()
        return self._observe()

    def _begin(self, instance: Instance, seed: int) -> None:
        """A new host and empty books."""
        self.instance = instance
        self.seed = seed
        self.ledger = Ledger()
        budget = self.spec.budget
        self.clock = DecisionClock(budget.amount * self.instance.budget, budget.decisions)
        self._clear()
        self._start()
        self._start_shape = self._shape()
        self.reference = self._reference()

    def step(self, action: GraftAction) -> Transition:
        """Apply the action, train to the next decision, evaluate.

        Raises:
            UserError: the action answers an older observation or is not legal; nothing has been changed then.
        """
        candidate = self._accept(action)
        self._slice = self.loss, self.ledger.parameter_seconds
        if candidate.operation != "wait":
            self._apply(candidate, action.reason)
        return self.finish()

    @property
    def unfinished(self) -> bool:
        """Whether a slice is under way: `finish` is then what comes next, not `step`."""
        return self._slice is not None

    @property
    def ended(self) -> bool:
        """Whether the budget is spent or the run was given up."""
        return self.clock.spent or self.failure is not None

    def finish(self) -> Transition:
        """Train to the next decision: the rest of a `step` that was interrupted."""
        assert self._slice is not None
        loss_before, cost_before = self._slice
        self.loss = self._train(self.clock.boundary)
        self.clock.advance(self.reading())
        self._sequence += 1
        rented = self.ledger.parameter_seconds - cost_before
        if self.failure is not None:  # the rent that the run does not pay is charged
            rented += self._unpaid()
        self._slice = None
        telemetry = self._observe()
        reward = (loss_before - self.loss) - self.spec.reward.rent * rented / self.reference
        terminated = self.ended
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
            "diverged": self.failure is not None,
            "failure": self.failure,
            "parameters": shape.parameters_count(),
            "parameters_non_embedding": shape.parameters_count(non_embedding=True),
            "layers": shape.depth(),
            "shape": shape.layers_as_json(),
            **self.ledger.as_dict(),
            "clock": self.spec.clock.kind,
            "budget": {"axis": self.spec.budget.axis, "amount": self.clock.amount},
            "decisions": self._sequence,
            "grafts": list(self.grafts),
            "prunes": list(self.prunes),
            "rollbacks": list(self.rollbacks),
            "annealed": list(self.annealed),
            "val_curve": list(self.curve),
        }

    # -- Saving --------------------------------------------------------------------------------------------------

    def books(self) -> dict[str, Any]:
        """Everything but what trains, as JSON values."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "instance": self.instance.model_dump(mode="json"),
            "seed": self.seed,
            "ledger": self.ledger.as_dict(),
            "passed": self.clock.passed,
            "loss": self.loss,
            **{name: getattr(self, name) for name in RECORDS},
            "grafted": self._grafted,
            "lockout": [[*key, until] for key, until in self._lockout.items()],
            "slice": self._slice,
            "sequence": self._sequence,
        }

    def _load_books(self, books: dict[str, Any]) -> None:
        """Take over what `books` gave, of an episode of this spec that has just begun with that instance and seed."""
        self.ledger = Ledger(**books["ledger"])
        self.clock.passed = books["passed"]
        self.loss = books["loss"]
        for name in RECORDS:
            setattr(self, name, books[name])
        self._grafted = [(passed, site) for passed, site in books["grafted"]]
        self._lockout = {(site, blueprint): until for site, blueprint, until in books["lockout"]}
        self._slice = books["slice"] and tuple(books["slice"])
        self._sequence = books["sequence"]

    # -- Where it stands -----------------------------------------------------------------------------------------

    def reading(self) -> float:
        """What the run has used on its budget's axis."""
        return self.ledger.read(self.spec.budget.axis)

    def fraction(self) -> float:
        """Fraction of the budget spent."""
        return self.clock.fraction(self.reading())

    def expected_seconds(self) -> float:
        """Seconds that the next decision should take at the size now, by the clock's formula; 0 once ended."""
        clock, tokens, split = self.spec.clock, batch_tokens(self.spec), self._split()
        left = max(0.0, self.clock.boundary - self.reading()) if not self.ended else 0.0
        steps = left / clock.axis_per_step(self.spec.budget.axis, self._shape(), tokens, split=split)
        return steps * clock.step_seconds(self._shape(), tokens, split=split)

    def options(self) -> Options:
        """Every candidate at the shape now."""
        return options(self._shape(), tuple(self.blueprints.values()), self._newest())

    # -- Helpers -------------------------------------------------------------------------------------------------

    def _accept(self, action: GraftAction) -> Candidate:
        if self.ended:
            raise UserError("the episode has ended: call reset before step.")
        if action.sequence != self._sequence:
            raise UserError(
                f"the action answers observation {action.sequence}, but the last one is {self._sequence}: "
                "a late reply is refused."
            )
        if not (0 <= action.index < len(self.telemetry.actions) and self.telemetry.mask[action.index]):
            legal = ", ".join(str(self.telemetry.actions[i]) for i in self.telemetry.legal())
            raise UserError(f"action {action.index} is not legal here: the legal ones are {legal}.")
        return self.telemetry.actions[action.index]

    def _apply(self, candidate: Candidate, reason: str) -> None:
        record: dict[str, Any] = {
            "budget_fraction": self.fraction(),
            "decision": self._sequence,
            "optimizer_step": self.ledger.steps,
            "site": candidate.site,
            "blueprint": candidate.blueprint,
            "parameters_before": self._shape().parameters_count(),
            "val_loss_before": self.loss,
            "reason": reason,
        }
        self._change(candidate)
        record |= {"parameters_after": self._shape().parameters_count(), "val_loss_after": self._evaluate()}
        if candidate.operation == "graft":
            self._grafted.append((self.clock.passed, candidate.site or ""))
            self.grafts.append(record | {"outcome": None})
        else:
            self._settle(candidate.site, "pruned")
            self.prunes.append(record)

    def _change(self, candidate: Candidate) -> None:
        """Change the host; WAIT changes nothing."""
        if candidate.operation == "graft":
            self._graft(candidate.site or "", candidate.blueprint or "")
        elif candidate.operation == "prune":
            self._prune(next(seed for seed in self._newest() if seed.site == candidate.site))

    def _settle(self, site: str | None, outcome: str | None, of: Sequence[str | None] = (None, "kept")) -> None:
        """Note what became of the newest graft at a site; of those still there, unless others are meant."""
        for record in reversed(self.grafts):
            if record["site"] == site and record["outcome"] in of:
                record["outcome"] = outcome
                return

    def _cool(self, site: str, blueprint: str) -> None:
        """Allow no such graft for a while."""
        self._lockout[site, blueprint] = self.clock.passed + 1 + self.spec.growth.lockout_decisions

    def _observe(self) -> Telemetry:
        """Note the point reached, and make the observation there."""
        self.curve.append(self._point())
        self.telemetry = self._look()
        return self.telemetry

    def _point(self) -> dict[str, float]:
        """Budget fraction, ledger axes, size and loss now."""
        axes = ("steps", "tokens", "flops", "seconds", "wall_seconds", "parameter_seconds")
        return {
            "budget_fraction": self.fraction(),
            **{axis: getattr(self.ledger, axis) for axis in axes},
            "parameters": self._priced().layout.parameters,
            "val_loss": self.loss,
        }

    def _look(self) -> Telemetry:
        fraction = self.fraction()
        outcomes = {"kept": 1.0, "rolled back": -1.0}
        moment = Moment(
            sequence=self._sequence,
            decision=self.clock.passed,
            decisions=self.clock.decisions,
            budget_used=fraction,
            decaying=fraction >= self.spec.optimizer.decay_from,
            tokens=self.ledger.tokens,
            vocab_size=self._vocab_size(),
            losses=self._seen(),
            grafts=self._grafted,
            outcome=outcomes.get(self.grafts[-1]["outcome"]) if self.grafts else None,
            lockout={key for key, until in self._lockout.items() if self.clock.passed < until},
            reference=self.reference,
        )
        return observe(self.spec, moment, self._priced(), self._measure())

    def _priced(self) -> Priced:
        """The candidates now, laid out and priced: as last time, unless they have changed."""
        found, split = self.options(), self._split()
        layout = None if self._last is None else self._last.layout
        if layout is None or layout.found is not found or layout.split != split:
            layout = lay_out(self._pricing, found, split, self._start_shape)
            self._last = Priced.of(
                layout, self.clock.amount, self.clock.decisions, self.spec.growth.min_optimizer_steps
            )
        assert self._last is not None
        return self._last

    def _seen(self) -> list[tuple[float, float]]:
        """(Budget fraction, validation loss) at the decisions so far, as a controller sees them."""
        return [(point["budget_fraction"], point["val_loss"]) for point in self.curve]

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


def as_json(value: Any) -> Any:
    """A copy with lists for tuples."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats per token; a loss past 50 nats says nothing more."""
    return math.exp(min(loss, 50.0))
