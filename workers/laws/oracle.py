"""The clairvoyant bound: the lowest final loss that a surrogate instance allows, by dynamic programming.

What a controller who knew the law could reach. A surrogate's state is (decision, shape, loss): noise is in observations
only. Law and costs know a shape by its totals, its *class* (layers, heads, neurons, experts), and at an equal decision
and class a lower loss stays lower whatever is done, so that keeping the least loss of each (decision, class) is exact:

    L[k + 1, c] = min( trained(L[k, c], a slice),  min over blueprints b: trained(L[k, c − b], a slice less b's cost) )

A graft whose cost is more than a slice merges decisions, and then arrives that much later. Sites differ in nothing but
their `limit`, and how a class's units are spread leaves the sum of what the limits still allow unchanged: a class has a
legal graft if any of its shapes has. Prunes are left out: they never pay (`tests/workers/test_clairvoyant.py` lets them
pay as well as they might, and finds the same bound).

The reward of an episode is (ln V − final loss) − rent. On a parameter-second budget every episode pays the same rent
(up to a last graft's overshoot), so the loss bounds the return too; on another axis it bounds the loss alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from esper.platform.budget import DecisionClock
from esper.platform.contracts import GraftAction, Instance, Probe
from esper.platform.spec import RunSpec
from esper.platform.telemetry import Telemetry
from esper.workers.candidates import within_caps
from esper.workers.kasmina.registry import Blueprint, make_blueprints
from esper.workers.laws.scaling_law import CONTINUOUS, VOCABULARY, Law, Size, start_of, whole_steps
from esper.workers.observe import SEGMENTS, batch_tokens
from esper.workers.tolaria.model.shape import TransformerShape

NONE = -1


@dataclass(frozen=True)
class Classes:
    """Every class that grafts lead to from a start, class 0: C of them, B blueprints.

    Attributes:
        blueprints: names, B of them.
        size: arrays (C,).
        tokens_per_unit: tokens that one unit of the budget's axis buys, float64 (C,).
        graft_cost: of a graft that leads here, on the budget's axis, float64 (C,).
        axis_per_step: what a decision's legality reckons a step with after such a graft, float64 (B, C).
        source: class that a graft of this blueprint leads here from, or NONE, int64 (B, C).
        target: class that a graft of this blueprint leads to from here, or NONE, int64 (B, C).
    """

    blueprints: tuple[str, ...]
    size: Size
    tokens_per_unit: np.ndarray
    graft_cost: np.ndarray
    axis_per_step: np.ndarray
    source: np.ndarray
    target: np.ndarray


def classes(spec: RunSpec, n_layer: int) -> Classes:
    """The classes of a spec's runs that start with so many layers."""
    part = spec.model_dump_json(include={"host", "data", "optimizer", "clock", "budget", "growth"})
    return _classes(part, n_layer)


@lru_cache(maxsize=64)
def _classes(part: str, n_layer: int) -> Classes:
    spec = RunSpec.model_validate_json(part)
    blueprints = make_blueprints(spec.growth.blueprints)
    first = start_of(spec, n_layer)
    shapes, number = [first], {_key(first): 0}
    edges: list[tuple[int, int, int]] = []
    moments = sum(1 for at in slices_of(spec, Instance()).fractions if at < spec.optimizer.decay_from)
    begin = 0
    for _ in range(moments):  # one graft a decision
        end = len(shapes)
        for here in range(begin, end):
            for b, blueprint in enumerate(blueprints.values()):
                after = _grown(shapes[here], blueprint)
                if after is not None and within_caps(after, spec.growth.max_layers, spec.growth.max_parameters):
                    there = number.setdefault(_key(after), len(shapes))
                    if there == len(shapes):
                        shapes.append(after)
                    edges.append((b, here, there))
        begin = end
    return _measured(spec, tuple(blueprints.values()), shapes, edges)


def _grown(shape: TransformerShape, blueprint: Blueprint) -> TransformerShape | None:
    """A shape of the class that a graft leads to, or None where no site may take one."""
    for site in shape.injection_specs():
        if blueprint.name in site.blueprints and blueprint.allowed(shape, site.id):
            after = blueprint.resized(shape, site.id)
            assert isinstance(after, TransformerShape)
            return after
    return None


def _key(shape: TransformerShape) -> tuple[int, int, int, int]:
    layers = shape.layers
    return len(layers), sum(layer.heads for layer in layers), sum(layer.width for layer in layers), shape.experts()


def _measured(
    spec: RunSpec, blueprints: tuple[Blueprint, ...], shapes: list[TransformerShape], edges: list[tuple[int, int, int]]
) -> Classes:
    clock, axis, tokens = spec.clock, spec.budget.axis, batch_tokens(spec)
    sizes = [Size.of(shape) for shape in shapes]
    source = np.full((len(blueprints), len(shapes)), NONE)
    target = source.copy()
    for b, here, there in edges:
        source[b, there], target[b, here] = here, there
    segments = [blueprint.adds in SEGMENTS for blueprint in blueprints]
    cost = {"parameter_seconds": [s.parameters_count() for s in shapes], "seconds": [1] * len(shapes)}
    return Classes(
        blueprints=tuple(blueprint.name for blueprint in blueprints),
        size=Size(*(np.array([getattr(s, name) for s in sizes], float) for name in ("attention", "other", "layers"))),
        tokens_per_unit=np.array([tokens / clock.axis_per_step(axis, s, tokens) for s in shapes]),
        graft_cost=clock.graft_seconds * np.array(cost.get(axis, [0] * len(shapes)), float),
        axis_per_step=np.array([[clock.axis_per_step(axis, s, tokens, split=x) for s in shapes] for x in segments]),
        source=source,
        target=target,
    )


@dataclass(frozen=True)
class Slices:
    """The decisions of an episode, as far as no action changes them: K of them.

    Attributes:
        amounts: what each slice holds, on the budget's axis, float64 (K,).
        fractions: of the budget spent at each decision, float64 (K,).
        budget: B, on the budget's axis.
        decisions: that B is cut into; on an axis of whole steps K may be less.
    """

    amounts: np.ndarray
    fractions: np.ndarray
    budget: float
    decisions: int


def slices_of(spec: RunSpec, instance: Instance) -> Slices:
    """The slices of an instance's episodes."""
    clock = DecisionClock(spec.budget.amount * instance.budget, spec.budget.decisions)
    if spec.budget.axis in CONTINUOUS:
        ends = np.arange(clock.decisions + 1) / clock.decisions
        return Slices(np.full(clock.decisions, clock.slice), ends[:-1], clock.amount, clock.decisions)
    unit = 1 if spec.budget.axis == "steps" else batch_tokens(spec)
    readings = [0]
    while not clock.spent:
        readings.append(readings[-1] + unit * whole_steps(clock.boundary - readings[-1], unit))
        clock.advance(readings[-1])
    used = np.array(readings, float)
    return Slices(np.diff(used), used[:-1] / clock.amount, clock.amount, clock.decisions)


@dataclass(frozen=True)
class Plan:
    """What a clairvoyant controller does.

    Attributes:
        loss: the lowest final loss, nats: the bound.
        actions: blueprint or None (wait) at each decision that the episode then has.
    """

    loss: float
    actions: tuple[str | None, ...]


def bound(spec: RunSpec, instance: Instance, seed: int = 0) -> float:
    """The lowest final loss, nats per token, that any controller can reach on a surrogate's instance.

    Args:
        spec: of the runs.
        instance: which.
        seed: of the episode; it chooses the law where the instance names none, and nothing else.
    """
    return plan(spec, instance, seed).loss


def plan(spec: RunSpec, instance: Instance, seed: int = 0) -> Plan:
    """The bound, and a way to reach it."""
    known = classes(spec, instance.n_layer or spec.host.n_layer)
    law = Law.drawn(seed if instance.law is None else instance.law, spec)
    slices = slices_of(spec, instance)
    count, width = len(slices.amounts), len(known.tokens_per_unit)
    size_loss = law.size_loss(known.size)
    allowed = legal(spec, slices, known)
    span = spans(slices, known)
    best = np.full((count + 1, width), np.inf)
    came: np.ndarray = np.full((count + 1, width, 2), NONE)  # (decision, blueprint or NONE) that the best came by
    best[0, 0] = np.log(VOCABULARY)
    for k in range(count):
        alive = np.flatnonzero(np.isfinite(best[k]))
        tokens = slices.amounts[k] * known.tokens_per_unit[alive]
        _take(best, came, k + 1, alive, law.trained(best[k, alive], size_loss[alive], tokens), k, NONE)
        if slices.fractions[k] >= spec.optimizer.decay_from:
            continue
        for b in range(len(known.blueprints)):
            there = np.flatnonzero(allowed[b])
            there = there[np.isfinite(best[k, known.source[b, there]])]
            before = best[k, known.source[b, there]]
            for merged in np.unique(span[there]):
                at, ends = span[there] == merged, min(count, k + merged)
                to = there[at]
                left = np.maximum(0.0, slices.amounts[k:ends].sum() - known.graft_cost[to])
                after = law.trained(before[at], size_loss[to], left * known.tokens_per_unit[to])
                _take(best, came, ends, to, after, k, b)
    last = int(best[count].argmin())
    return Plan(float(best[count, last]), _way(known, came, count, last))


def legal(spec: RunSpec, slices: Slices, known: Classes) -> np.ndarray:
    """Whether a graft of a blueprint that leads to a class is legal before the rate decays: bool (B, C)."""
    steps = slices.budget / slices.decisions / known.axis_per_step
    return (known.source != NONE) & (steps >= spec.growth.min_optimizer_steps)


def spans(slices: Slices, known: Classes) -> np.ndarray:
    """Slices that a decision with a graft takes, by the class that it leads to: int64 (C,)."""
    return np.maximum(1, np.ceil(known.graft_cost / slices.amounts[0] - 1e-9)).astype(int)


def _take(
    best: np.ndarray, came: np.ndarray, k: int, to: np.ndarray, losses: np.ndarray, since: int, blueprint: int
) -> None:
    better = losses < best[k, to]
    best[k, to[better]] = losses[better]
    came[k, to[better]] = since, blueprint


def _way(known: Classes, came: np.ndarray, k: int, at: int) -> tuple[str | None, ...]:
    actions: list[str | None] = []
    while k > 0:
        k, b = (int(value) for value in came[k, at])
        actions.append(None if b == NONE else known.blueprints[b])
        at = at if b == NONE else int(known.source[b, at])
    return tuple(reversed(actions))


class ClairvoyantPolicy:
    """Plays a plan: of its instance's episodes, the best one.

    Args:
        plan: of the instance that will be played.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """The plan's action at this decision, at the first site where it is legal."""
        wanted: Any = self._plan.actions[telemetry.sequence]
        if wanted is None:
            return GraftAction(0, telemetry.sequence, "as planned")
        rows = [i for i in telemetry.legal() if telemetry.actions[i].blueprint == wanted]
        rows = [int(i) for i in rows if telemetry.actions[i].operation == "graft"]
        return GraftAction(rows[0], telemetry.sequence, "as planned")
