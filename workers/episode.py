"""An episode: one host's training run, decision by decision.

`Episode` keeps ledger, decision clock, reward and records. Subclasses start, change, train and measure the host:
`GrowthRun` with torch on data, `SurrogateRun` by a formula.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from esper.platform.clock import DecisionClock
from esper.platform.contracts import GraftAction, HostShape, Instance, Transition
from esper.platform.errors import UserError, in_a_sentence
from esper.platform.frozen import Frozen
from esper.platform.law_file import FittedLaws
from esper.platform.ledger import AXES, Ledger
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Candidate, Telemetry
from esper.workers.kasmina.registry import Natural, Planted
from esper.workers.laws.forecast import forecast
from esper.workers.laws.scaling_law import SIZE, size_of
from esper.workers.observe import Measured, Observer, batch_tokens
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.rate import rate

Finite = Annotated[float, Field(allow_inf_nan=False)]
Point = dict[str, Any]  # of the loss curve, in JSON values: budget fraction, ledger axes, parameters, validation loss
SavedPoints = list[dict[str, int | Finite | None]]


@dataclass
class Change:
    """A change of the host, as in `summary.json`."""

    budget_fraction: Finite
    decision: Natural  # number of the observation that it answered
    optimizer_step: Natural
    site: str
    blueprint: str
    parameters_before: Natural
    parameters_after: Natural
    val_loss_before: Finite
    reason: str
    val_loss_after: Finite | None = None  # nats per token; None until it is evaluated, and where it was not finite


@dataclass
class Graft(Change):
    """A graft; it has an outcome once the run has ended."""

    outcome: Literal["kept", "pruned", "rolled back", "on probation"] | None = None
    # Largest change of a logit that it made on a held-out batch, where that proved `val_loss_after` equal to
    # `val_loss_before`; None where the loss after it was evaluated.
    identity: Finite | None = None


@dataclass
class Rollback:
    """A fault that was undone, and the graft removed for it."""

    budget_fraction: Finite
    decision: Natural
    optimizer_step: Natural
    fault: str
    removed: str | None


class EpisodeState(Frozen):
    """An episode without its host: `Episode`'s attributes of the same names; callers may add keys."""

    model_config = ConfigDict(extra="ignore")

    spec: RunSpec
    instance: Instance
    seed: int
    ledger: Ledger
    passed: Natural  # boundaries
    loss: Annotated[float, Field(gt=0)]
    curve: SavedPoints
    grafts: list[Graft]
    prunes: list[Change]
    rollbacks: list[Rollback]
    annealed: SavedPoints
    failure: str | None
    grafted: list[tuple[Natural, str]]
    lockout: list[tuple[str, str, int]]
    unfinished: bool
    paid: Annotated[float, Field(ge=0)]
    sequence: Natural
    rewards: list[Finite]


class Episode(ABC):
    """The Run and Probe contracts without the training."""

    State: ClassVar[type[EpisodeState]]
    # The host, as the subclass made it: set before `_resized`.
    shape: Any
    planted: dict[int, Planted]  # graft number → seed, oldest graft first

    def __init__(
        self, spec: RunSpec, vocab_size: int, born: HostShape | None = None, tokens_per_step: int | None = None
    ) -> None:
        """Of a host that the spec does not describe, `born` is its shape at the start."""
        self.spec, self.vocab_size = spec, vocab_size
        self._given, self.tokens_per_step = born, tokens_per_step or batch_tokens(spec)
        self.observer = Observer(spec, born, self.tokens_per_step)
        self.space, self.blueprints = self.observer.space, self.observer.blueprints
        self.telemetry: Telemetry  # the last observation

    @abstractmethod
    def _start(self) -> None: ...  # make the host of `self.instance` from `self.seed`
    @abstractmethod
    def _change(self, candidate: Candidate) -> None: ...  # graft, or prune a site's newest seed; charge the ledger
    # Train one step or more until `boundary`; returns the validation loss in nats per token as taken at decisions, and
    # the one to record: the same, but on the whole held-out set where the episode ends. Sets `failure` to give up.
    @abstractmethod
    def _train(self, boundary: float) -> tuple[float, float]: ...
    @abstractmethod
    def _evaluate(self) -> float: ...  # validation loss as at decisions, nats per token
    @abstractmethod
    def _measured(self) -> Measured: ...  # in the last slice
    # The losses of each action's copy, (steps,), and its ledger.
    @abstractmethod
    def _tries(self, actions: Sequence[GraftAction], optimizer_steps: int) -> Iterator[tuple[Any, Ledger]]: ...

    def _restore(self, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what `State` does not hold, if anything."""

    def reset(self, instance: Instance | None = None, seed: int = 0) -> Telemetry:
        """Start an episode; returns the first observation, at budget fraction 0."""
        self._begin(instance or Instance(), seed)
        self.loss = self._evaluate()
        return self._observe()

    def _begin(self, instance: Instance, seed: int) -> None:
        self.instance, self.seed = instance, seed
        self.clock = DecisionClock(self.spec.budget.amount * instance.budget, self.spec.budget.decisions)
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
        self.rewards: list[float] = []  # of each decision, in nats
        self._born: HostShape = self._given or start_shape(self.spec, self.vocab_size, instance.n_layer)
        self._start()
        self._resized()
        self.reference = self.spec.reward.reference or (  # parameter-seconds that cost `reward.rent` nats
            self.clock.amount if self.spec.budget.axis == "parameter_seconds" else self._cost_of(self.clock.amount)
        )

    def step(self, action: GraftAction) -> Transition:
        """`begin` and `finish`."""
        self.begin(action)
        return self.finish()

    def begin(self, action: GraftAction) -> None:
        """Apply the action; UserError, and no change, for an illegal or late one."""
        candidate = self._accept(action)
        self.unfinished = True
        if candidate.operation != "wait":
            there = self.planted
            values: dict[str, Any] = {
                "budget_fraction": self.fraction(),
                "decision": self.sequence,
                "optimizer_step": self.ledger.steps,
                "site": candidate.site,
                "blueprint": candidate.blueprint,
                "parameters_before": self.layout.parameters,
                "val_loss_before": self.loss,
                "reason": action.reason,
            }
            if candidate.operation == "graft":
                identity = self._graft(candidate)
                after = None if identity is None else self.loss
                values |= {"parameters_after": self.layout.parameters, "val_loss_after": after}
                self.grafted.append((self.clock.passed, candidate.site or ""))
                self.grafts.append(Graft(**values, identity=identity))
            else:
                self._change(candidate)
                self.prunes.append(Change(**values, parameters_after=self.layout.parameters))
                for number in there.keys() - self.planted.keys():  # the seed, and those inside it
                    self.grafts[number].outcome = "pruned"

    @property
    def ended(self) -> bool:  # the budget is spent, or the run was given up
        return self.clock.spent or self.failure is not None

    def finish(self) -> Transition:
        """Train to the next decision: the rest of an interrupted `step`."""
        self._tell_change()
        loss_before = self.loss
        loss, self.loss = self._train(self.clock.boundary)
        self.clock.advance(self.reading())
        self.sequence += 1
        rented, self.paid = self.ledger.parameter_seconds - self.paid, self.ledger.parameter_seconds
        if self.failure is not None:  # a failed run pays the rest of its rent too
            rented += self._cost_of(max(0.0, self.clock.amount - self.reading()))
        self.unfinished = False
        for graft in self.grafts if self.ended else ():
            graft.outcome = graft.outcome or "on probation"
        reward = (loss_before - loss) - self.spec.reward.rent * rented / self.reference
        self.rewards.append(reward)
        telemetry, info = self._observe(), {"point": self.curve[-1]}
        if self.ended:
            info["summary"] = self.summary()
        return Transition(telemetry, reward, self.ended, info=info)

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> np.ndarray:
        """Losses after each action on a copy, on the same batches, float64 (actions, steps); charged on every axis."""
        before = replace(self.ledger)
        losses, ledgers = zip(*self._tries(actions, optimizer_steps), strict=True)
        for ledger in ledgers:
            self.ledger.add(ledger.less(before))
        return np.array(losses)

    def forecast(self, laws: FittedLaws) -> np.ndarray:
        return forecast(self, laws)

    def summary(self) -> dict[str, Any]:
        """Loss, sizes, ledger axes, curve and changes so far, as JSON values."""
        return {
            "seed": self.seed,
            "preset": self.spec.preset,
            "val_loss": self.loss,
            "perplexity": perplexity(self.loss),
            "diverged": self.failure is not None,
            "failure": self.failure,
            "parameters": self.layout.parameters,
            "parameters_non_embedding": self.layout.non_embedding,
            "layers": self.shape.depth(),
            "shape": self.shape.layers_as_json(),
            **self.ledger.as_dict(),
            "clock": self.spec.clock.kind,
            "budget": {"axis": self.spec.budget.axis, "amount": self.clock.amount},
            "decisions": self.sequence,
            **{name: [asdict(each) for each in getattr(self, name)] for name in ("grafts", "prunes", "rollbacks")},
            "annealed": list(self.annealed),
            "rewards": list(self.rewards),
            "val_curve": list(self.curve),
        }

    def sample(self, tokens: int) -> str | None:
        return None

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that `load` needs to continue to the same numbers: JSON values, and tensors by name."""
        own = {name: getattr(self, name) for name in self.State.model_fields if name != "passed"}
        return self.State(passed=self.clock.passed, **own).model_dump(mode="json"), {}

    def load(self, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Restore a `state` of the same spec; UserError for an impossible one."""
        state = self.State.checked(values, "the checkpoint")
        others = {"ppo": self.spec.ppo, "fleet": self.spec.fleet}  # which decide no numbers of a run
        if state.spec.model_copy(update=others) != self.spec:
            raise UserError("the checkpoint is of a run of another spec: go on with the spec that it was saved with.")
        with in_a_sentence("the checkpoint's parts do not fit together", "restore an older copy of it"):
            if (state.instance.n_layer or 1) > self.spec.growth.max_layers or len(state.curve) != state.sequence + 1:
                raise ValueError("records of no run that could be")
            self._begin(state.instance, state.seed)
            for name in self.State.model_fields.keys() - {"spec", "passed"}:
                setattr(self, name, getattr(state, name))
            self.clock.passed = state.passed
            self._restore(values, tensors)
            self._resized()
            self.telemetry = self._look()

    def reading(self) -> float:  # the amount used on the budget's axis
        return self.ledger.read(self.spec.budget.axis)

    def fraction(self) -> float:
        return min(1.0, self.reading() / self.clock.amount)

    def expected_seconds(self) -> float:
        """Predicted seconds until the next decision at the current size; 0 once ended."""
        left = max(0.0, self.clock.boundary - self.reading())
        return 0.0 if self.ended else self._seconds_of(left)

    def seen(self) -> list[tuple[float, float]]:
        """(Budget fraction, validation loss) at each decision, as a controller sees them."""
        return [(point["budget_fraction"], point["val_loss"]) for point in self.curve]

    def host_rate(self) -> float:
        """The host's learning rate now, as telemetry tells it."""
        return rate(self.spec.optimizer, self.fraction(), self.layout.non_embedding)

    def _tell_change(self) -> None:
        """Evaluate what the last action has changed, where nothing else says how it moved the loss."""
        for change in (*self.grafts[-1:], *self.prunes[-1:]):
            if change.decision == self.sequence and change.val_loss_after is None:
                loss = self._evaluate()
                change.val_loss_after = loss if math.isfinite(loss) else None

    def _graft(self, candidate: Candidate) -> float | None:
        """Graft; returns `Graft.identity`."""
        self._change(candidate)
        return None

    def _resized(self) -> None:
        newest = {seed.site: seed for seed in self.planted.values()}
        self.layout = self.observer.layout(self.shape, tuple(newest.values()), self._born)

    def _accept(self, action: GraftAction) -> Candidate:
        if self.ended:
            raise UserError("the episode has ended: call reset before step.")
        if action.sequence != self.sequence:
            raise UserError(f"a late reply: it answers observation {action.sequence}, the last is {self.sequence}.")
        if not (0 <= action.index < len(self.telemetry.actions) and self.telemetry.mask[action.index]):
            legal = ", ".join(str(self.telemetry.actions[i]) for i in self.telemetry.legal())
            raise UserError(f"action {action.index} is not legal here: the legal ones are {legal}.")
        return self.telemetry.actions[action.index]

    def _observe(self) -> Telemetry:
        self.curve.append(self._point())
        self.telemetry = self._look()
        return self.telemetry

    def _look(self) -> Telemetry:
        return self.observer.observe(self, self._measured())

    def _point(self) -> Point:
        axes = {axis: getattr(self.ledger, axis) for axis in (*AXES, "wall_seconds")}
        sizes = {
            "parameters": self.layout.parameters,
            **dict(zip(SIZE, map(int, size_of(self.shape)[:, 0]), strict=True)),
        }
        return {"budget_fraction": self.fraction(), **axes, **sizes, "val_loss": self.loss}

    def _seconds_of(self, amount: float) -> float:
        """Predicted seconds of `amount` on the budget's axis at the current size."""
        return amount / float(self.layout.axis_per_step[0]) * self.layout.step_seconds

    def _cost_of(self, amount: float) -> float:
        return self._seconds_of(amount) * self.layout.parameters


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token, capped at 50 nats."""
    return math.exp(min(loss, 50.0))
