"""Grower: growth in a training loop that is not Esper's (docs/your-own-loop.md)."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.pipelines.common.play import barren
from esper.platform.clock import ClockSpec
from esper.platform.console import say
from esper.platform.contracts import GraftAction, GrowthPolicy, Stateful, check_host
from esper.platform.errors import UserError, clipped, in_a_sentence
from esper.platform.host_spec import HostSpec, ResNetSpec
from esper.platform.law_file import FIT
from esper.platform.ledger import AXES
from esper.platform.spec import RunSpec, load_spec
from esper.platform.telemetry import Candidate, Telemetry
from esper.policies.arms import ARMS, ArmInputs, make_policy
from esper.policies.own import as_policy, blamed
from esper.policies.schedule import Entry, SchedulePolicy
from esper.policies.static import StaticPolicy
from esper.workers.kasmina import Kasmina
from esper.workers.kasmina.registry import blueprints_of, make_blueprints
from esper.workers.own_loop import NO_COPIES, LoopState, OwnLoop, Ranks

Controller = str | Path | Sequence[tuple[float, str]] | GrowthPolicy | Callable[[Telemetry], int]


@dataclass(frozen=True)
class Budget:
    """How much the training may use, on exactly one axis, and in how many decisions it is cut."""

    seconds: float | None = None  # of wall time
    parameter_seconds: float | None = None  # the integral of the parameters over wall time
    steps: float | None = None  # optimizer steps
    tokens: float | None = None
    flops: float | None = None
    decisions: int = 24

    def values(self) -> dict[str, Any]:
        """As the fields of a `BudgetSpec`."""
        given = {axis: amount for axis in AXES if (amount := getattr(self, axis)) is not None}
        if len(given) != 1:
            what = f"a Budget is on one axis, and this one has {len(given)}"
            raise UserError(f"{what}: give one of {', '.join(AXES)}, as in Budget(steps=20_000).")
        ((axis, amount),) = given.items()
        return {"axis": axis, "amount": amount, "decisions": self.decisions}


class Grower:
    """Grows `model` (a host, or DistributedDataParallel around one) as the user's loop trains it by `optimizer`.

    Args:
        controller: an arm's name; a policy or schedule file; [(budget fraction, blueprint), …]; a GrowthPolicy; or a
            function of Telemetry that returns a row of `telemetry.actions`, 0 to wait.
        budget: what is cut into decisions; steps after its end train and grow nothing.
        evaluate: the validation loss now, in nats; called without gradients, in evaluation mode.
        clip: largest norm of the whole gradient.
        grow_until: fraction of the budget from which on nothing is grafted: where the rate starts to fall.
        tokens_per_step: of one optimizer step, over all ranks; None: counted from what the first one's forwards got.
        outputs: kinds of targets (vocabulary or classes), of a host that does not tell them.
        growth: settings of `GrowthSpec`, such as {"max_layers": 8}.
        preset: what the other settings are taken from; laws and policies may be of one.
        clock: None: measured time for budgets of time, whose costs of grafts follow it; else the reference's formula.
        laws: a file of fitted laws, for the planner.

    Raises UserError, the model as it was, for a model that is no host or has tensors tied in a way that growth would
    undo, an optimizer that holds other parameters, and a controller that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        controller: Controller = "tamiyo",
        *,
        budget: Budget,
        evaluate: Callable[[], float],
        clip: float = 1.0,
        grow_until: float = 0.8,
        tokens_per_step: int | None = None,
        outputs: int | None = None,
        growth: Mapping[str, Any] | None = None,
        preset: str | Path | None = None,
        clock: ClockSpec | None = None,
        laws: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if not clip > 0:
            raise UserError(f"clip is {clip}: it must be above 0, and math.inf does not clip.")
        if not isinstance(budget, Budget):
            raise UserError(f"budget is {clipped(budget)}: it must be a Budget, as in budget=Budget(steps=20_000).")
        if not callable(evaluate):
            raise UserError(f"evaluate is {clipped(evaluate)}: give a function that returns the validation loss.")
        closure = signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UserError(f"{type(optimizer).__name__}.step needs a closure: take an optimizer without, as AdamW.")
        self._ranks = Ranks(model)
        host = self._ranks.host
        check_host(host)
        check_ties(host)
        self._spec = _spec(host, budget, growth or {}, preset, clock, grow_until)
        self._kasmina = Kasmina(
            host,
            optimizer,
            blueprints=blueprints_of(self._spec.growth),
            probation_steps=self._spec.growth.probation_steps,
            seed=seed,
        )
        self._outputs = outputs or (len(host.get_parameter(host.OUTPUTS)) if hasattr(host, "OUTPUTS") else 0)
        if self._outputs < 2:
            what = "outputs= is missing or below 2, and the governor needs to know the loss of a guess, ln(outputs)"
            raise UserError(f"{what}: give the size of the vocabulary, or the number of classes.")
        self._policy = _policy(controller, ArmInputs(seed, spec=self._spec, laws=Path(laws) if laws else None))
        self.model = model
        self.run: OwnLoop | None = None  # made by the first step
        self._optimizer, self._evaluate, self._clip, self._seed = optimizer, evaluate, clip, seed
        self._born, self._sizes = host.shape, _sizes(host)
        self._since: float | None = None  # the end of the last step
        self._counted, self._tokens = 0, tokens_per_step
        self._hook = host.register_forward_pre_hook(self._count)
        self._stepped = False  # by the loop, since the last `step`
        optimizer.register_step_post_hook(self._note_step)

    @property
    def ended(self) -> bool:
        """Whether the budget is spent."""
        return self.run is not None and self.run.ended

    def summary(self) -> dict[str, Any]:
        """Loss, sizes, what was used, curve, grafts and rollbacks so far, as JSON values."""
        if self.run is None:
            raise UserError("nothing has been trained yet: call grower.step first.")
        return self.run.summary()

    def step(self, loss: Tensor) -> Candidate | None:
        """One optimizer step, in place of clipping, `optimizer.step` and `zero_grad`, after backward (or several).

        At the end of a slice of the budget it evaluates, asks the controller, and changes the model.

        Args:
            loss: of this step, a scalar in nats; of several backwards, their mean.

        Returns the graft or prune that was made, if any; raises UserError for a loop that lacks backward, or steps too.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserError(f"grower.step got {clipped(loss)}: give it the loss, a tensor of one number.")
        self._check_loop()
        run = self.run = self.run or self._first()
        changed = None
        if not (run.unfinished or run.ended):
            changed = self._decide(run)  # at the start; the gradients of what was there do not depend on a graft
        try:
            reached = run.push(loss.squeeze(), self._since or time.perf_counter())
        finally:
            self._stepped = False  # that was not the loop
        if reached:
            if run.failure is not None:
                what = f"training was given up: {run.failure}; the model is as it was at the last sound decision"
                raise UserError(f"{what}: lower the learning rate.")
            changed = changed if run.ended else self._decide(run)
        self._since = time.perf_counter()
        return changed

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on to the same numbers, for `torch.save`; tensors are not copied."""
        values, tensors = (None, {}) if self.run is None else self.run.state()
        policy = self._policy.state() if isinstance(self._policy, Stateful) else None
        return {
            "born": self._sizes,
            "run": values,
            "steps": tensors.get("steps"),
            "policy": policy,
            "model": self._ranks.host.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Grow a model as at its birth to what was saved, and go on; UserError, and no change, for another one."""
        host = self._ranks.host
        with in_a_sentence("this is no state of a Grower", "give what `grower.state_dict()` returned"):
            values, born, saved = state["run"], {name: tuple(size) for name, size in state["born"].items()}, None
            if values is not None:
                saved = LoopState.checked(values, "the state")
        if self.run is not None or _sizes(host) != born:
            what = "the state is of a model that began otherwise, or this one has been trained already"
            raise UserError(f"{what}: make the model as it was then, and a new Grower, and load before the first step.")
        if saved is not None:
            mine, clock = self._with_batches(saved.tokens_per_step), saved.spec.clock
            if mine.model_copy(update={"clock": clock}) != saved.spec or mine.clock.kind != clock.kind:
                raise UserError("the state is of a Grower with other settings: give it the same ones, its budget too.")
            for operation, site, blueprint in saved.history:
                if operation == "graft":
                    self._kasmina.graft(site, blueprint)
                else:
                    self._kasmina.prune(site)
            self._ranks.rewrap()
        host.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if saved is not None:
            run = self._loop(saved.spec, saved.tokens_per_step)
            run.load(state["run"], {"steps": state["steps"]})
            self.run = run
        if isinstance(self._policy, Stateful):
            self._policy.resume(state["policy"])

    def _first(self) -> OwnLoop:
        """The episode at its start."""
        tokens = self._tokens or self._ranks.first(lambda: self._counted) * self._ranks.count
        if tokens < 1:
            what = "tokens_per_step could not be counted: the model was called with keywords, or not at all"
            raise UserError(f"{what}: give tokens_per_step=, the tokens (or images) of one optimizer step.")
        run = self._loop(self._with_batches(tokens), tokens)
        run.reset(seed=self._seed)
        if not math.isfinite(run.loss):
            raise UserError(f"evaluate() returned {run.loss} before the first step: it must return a number of nats.")
        if self._ranks.speaks and not isinstance(self._policy, StaticPolicy) and (told := barren(run)):
            say(told)
        return run

    def _loop(self, spec: RunSpec, tokens: int) -> OwnLoop:
        self._hook.remove()
        return OwnLoop(
            spec,
            self._kasmina,
            self._ranks,
            self._loss,
            vocab_size=self._outputs,
            born=self._born,
            tokens_per_step=tokens,
            max_norm=self._clip,
        )

    def _decide(self, run: OwnLoop) -> Candidate | None:
        """Ask the controller, on one rank, and do what it says, on all."""

        def ask() -> GraftAction:
            with blamed(self._policy):
                return self._policy.act(run.telemetry, run)

        chosen = run.change(self._ranks.first(ask))
        return None if chosen.operation == "wait" else chosen

    @torch.no_grad()
    def _loss(self) -> float:
        """The user's validation loss, rank 0's; the model's mode and torch's random numbers are as before it."""
        host = self._ranks.host
        modes = {module: module.training for module in (self.model, *host.modules())}
        device = next(host.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.model.eval()
            try:
                value = self._evaluate()
                value = value.squeeze().tolist() if isinstance(value, Tensor) else value
            finally:
                for module, mode in modes.items():
                    module.training = mode
        value = self._ranks.first(lambda: value)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"evaluate() returned {clipped(value)}: it must return a loss above 0, one number of nats.")
        return float(value)

    def _count(self, host: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Tokens, or examples, that a forward pass learns from."""
        if torch.is_grad_enabled() and host.training and inputs and isinstance(inputs[0], Tensor):
            self._counted += len(inputs[0]) if inputs[0].is_floating_point() else inputs[0].numel()

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _check_loop(self) -> None:
        """Raise UserError where the optimizer has stepped already, or there is nothing to step by."""
        stepped, self._stepped = self._stepped, False
        if stepped:
            what = "the optimizer has stepped since the last grower.step, which steps it itself"
            raise UserError(f"{what}: leave optimizer.step() out of the loop.")
        if all(parameter.grad is None for group in self._optimizer.param_groups for parameter in group["params"]):
            mend = "call loss.backward() before grower.step, and no zero_grad between them"
            raise UserError(f"no parameter of the model has a gradient: {mend}.")

    def _with_batches(self, tokens: int) -> RunSpec:
        """The spec with as many examples in a batch, where they are whole: laws count by it."""
        spec = self._spec
        examples, rest = divmod(tokens, spec.host.tokens)
        if rest or not 1 <= examples <= 2**14:
            return spec
        return spec.model_copy(update={"data": spec.data.model_copy(update={"batch_size": examples})})


def _policy(controller: Controller, inputs: ArmInputs) -> GrowthPolicy:
    """What a user names, as a GrowthPolicy; UserError where it is none."""
    if controller == "lag":
        raise UserError(NO_COPIES)
    if controller in ("ppo", "schedule"):
        raise UserError(f"arm {controller!r} needs a file, which a Grower takes in its place: name it as controller.")
    if controller == "planner" and inputs.laws is None:
        raise UserError(f"arm 'planner' needs fitted laws: give laws=FILE, made by `{FIT}`.")
    if isinstance(controller, str | Path) and (path := Path(controller)).suffix == ".json":
        if not path.exists():
            raise UserError(f"the schedule {path} does not exist: name a file, or give [(budget fraction, blueprint)].")
        return make_policy("schedule", replace(inputs, schedule=path))
    if isinstance(controller, str) and (controller in ARMS or not ("/" in controller or Path(controller).exists())):
        return make_policy(controller, inputs)
    if isinstance(controller, str | Path):
        return make_policy("ppo", replace(inputs, policy=Path(controller)))
    if isinstance(controller, Sequence):
        entries = [Entry.checked({"at": at, "blueprint": name}, "the schedule") for at, name in controller]
        inputs.check("the schedule", (entry.blueprint for entry in entries))
        return SchedulePolicy(entries)
    return as_policy(controller, getattr(controller, "__name__", clipped(controller)))


def _spec(
    host: Any,
    budget: Budget,
    growth: Mapping[str, Any],
    preset: str | Path | None,
    clock: ClockSpec | None,
    grow_until: float,
) -> RunSpec:
    """The settings of a run like this one; what only Esper's own trainer reads is as it comes."""
    own, shape = getattr(host, "spec", None), host.shape
    settings = (own if isinstance(own, HostSpec | ResNetSpec) else HostSpec()).starting_with(shape.depth())
    values = (RunSpec() if preset is None else load_spec(preset)).model_dump(mode="json")
    amount = budget.values()
    values |= {"host": settings.model_dump(mode="json"), "budget": values["budget"] | amount}
    if preset is None:  # whole layers and units: an expert that no token has chosen has no gradient
        named = {name: {} for site in shape.injection_specs() for name in site.blueprints}
        blueprints = {name: {} for name, each in make_blueprints(named).items() if each.adds != "expert"}
        values["data"] = {"kind": settings.takes}
        values["growth"] |= {"blueprints": blueprints, "max_layers": 2 * shape.depth()}
    values["growth"] |= growth
    values["optimizer"] |= {"decay_from": grow_until}
    timed = amount["axis"] in ("seconds", "parameter_seconds")
    values["clock"] |= {"kind": "wall" if timed else "reference"} if clock is None else clock.model_dump(mode="json")
    return RunSpec.checked(values, "the Grower's settings")


def _sizes(host: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in host.state_dict().items()}


def check_ties(host: Any) -> None:
    """Raise UserError where tensors are tied in a way that a graft would undo, or that the shape does not tell."""
    growing = [module for site in host.shape.injection_specs() if site.units for module in host.linears(site.id)]
    resized = {id(parameter) for module in growing for parameter in module.parameters()}
    names: dict[int, list[str]] = {}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    if tied := next((each for key, each in names.items() if key in resized and len(each) > 1), None):
        raise UserError(f"{' and '.join(tied)} are one tensor, which a graft would pull apart: give each its own.")
    there, told = sum(parameter.numel() for parameter in host.parameters()), host.shape.parameters_count()
    if there != told:
        what = f"the model has {there:,} parameters, and its shape tells of {told:,}, as if others were tied"
        raise UserError(f"{what}: tie what the host's settings say (`tied`), or set these alike.")
