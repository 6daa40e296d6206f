"""What surrogates allow at best: the oracle's bound by dynamic programming, and the best fixed schedule by search.

    L[k + 1, c] = min( trained(L[k, c], a slice),  min over blueprints b: trained(L[k, c − b], a slice less b's cost) )

Exact: law and costs depend on a shape's *class* (its `totals`: layers, heads, neurons, experts) only, and a lower loss
stays lower. The spread of units over sites leaves the limits' sum unchanged, hence also legality. Prunes never pay.

Not exact for a ResNet, whose last stage asks 4 (width) to 16 times (a block) the first one's parameters: a plan's first
graft may be in any stage, those after it are at the deepest site that takes them, where schedules graft too. A
controller that grows earlier stages twice may end below its `bound`.

A schedule is int64 (K,): the blueprint to graft at each of the K growing decisions, or NONE; an illegal graft waits and
delays those after it. M schedules, I instances.
"""

from collections.abc import Iterable, Iterator
from dataclasses import astuple
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from esper.platform.clock import DecisionClock
from esper.platform.contracts import Instance
from esper.platform.seeding import stream
from esper.platform.spec import GrowthSpec, RunSpec
from esper.workers.kasmina.registry import Blueprint, blueprints_of
from esper.workers.laws.scaling_law import CONTINUOUS, VOCABULARY, Array, ScalingLaw, size_of, whole_steps
from esper.workers.observe import batch_tokens, within_caps
from esper.workers.tolaria.hosts import start_shape

NONE = -1
STARTS = 4  # starts of the search: the empty schedule and random ones
MOVES = (1, 2, 4)  # decisions by which a graft is moved

Entry = tuple[float, str]  # a schedule file's entry without a site: (budget fraction when due, blueprint)


class Classes(NamedTuple):
    """The C classes that grafts of B blueprints reach from the start, class 0."""

    blueprints: tuple[str, ...]
    size: np.ndarray  # by `size_of`, float64 (4, C)
    graft_cost: np.ndarray  # of a graft that leads here, on the budget's axis, float64 (C,)
    axis_per_step: np.ndarray  # a step's cost in each class, float64 (C,)
    # Class after a graft in this one, or NONE, int64 (B + V, C): after each blueprint's at the deepest site that takes
    # it; then, from class 0 only, the V classes that grafts at other sites lead to.
    target: np.ndarray
    of_totals: dict[tuple[int, ...], int]  # each class by a shape's `totals`


class Course(NamedTuple):
    """What actions do not change of an instance's episodes of K decisions, or of several as stacked arrays."""

    classes: Classes
    law: ScalingLaw
    size_loss: np.ndarray  # nats, float64 (C,)
    tokens_per_unit: np.ndarray  # effective tokens that one unit of the budget's axis buys, float64 (C,)
    used: np.ndarray  # on the budget's axis at each decision and at the end, float64 (K + 1,)
    fractions: np.ndarray  # of the budget at each decision, float64 (K,)
    growing: np.ndarray  # before the rate's decay, bool (K,)
    legal: np.ndarray  # whether a graft into a class is legal before the decay, bool (C,)
    spans: np.ndarray  # decisions until a graft into a class is paid, int64 (C,)


@lru_cache(maxsize=64)
def _classes(part: str, start: Any, most: int) -> Classes:
    """Of a spec's runs that start in a shape, after at most so many grafts."""
    spec = RunSpec.model_validate_json(part)
    growth, axis, tokens = spec.growth, spec.budget.axis, batch_tokens(spec)
    blueprints = blueprints_of(growth)
    shapes: list[Any] = [start]
    number, depth = {start.totals(): 0}, [0]  # of each class, and the grafts that lead to it

    def reached(here: int, after: Any) -> int:
        to = number.setdefault(after.totals(), len(shapes))
        if to == len(shapes):
            shapes.append(after)
            depth.append(depth[here] + 1)
        return to

    targets, elsewhere = [], set()
    for here, shape in enumerate(shapes):  # which grows on the way
        ways = [_grown(shape, blueprint, growth) for blueprint in blueprints.values() if depth[here] < most]
        deepest = [next(way, None) for way in ways] or [None] * len(blueprints)
        targets.append([NONE if after is None else reached(here, after) for after in deepest])
        elsewhere |= {reached(0, after) for way in ways for after in way if here == 0} - {*targets[0]}
    target = np.full((len(blueprints) + len(elsewhere), len(shapes)), NONE)
    target[: len(blueprints)] = np.array(targets).T
    target[len(blueprints) :, 0] = sorted(elsewhere)

    per_step = np.array([spec.clock.axis_per_step(axis, shape, tokens) for shape in shapes])
    cost = {"parameter_seconds": [shape.parameters_count() for shape in shapes], "seconds": [1] * len(shapes)}
    return Classes(
        blueprints=tuple(blueprints),
        size=size_of(*shapes),
        graft_cost=spec.clock.graft_seconds * np.array(cost.get(axis, [0] * len(shapes)), float),
        axis_per_step=per_step,
        target=target,
        of_totals=number,
    )


def _grown(shape: Any, blueprint: Blueprint, growth: GrowthSpec) -> Iterator[Any]:
    """The shapes after a graft, from the deepest site on."""
    for site in reversed(shape.injection_specs()):
        if blueprint.name in site.blueprints and blueprint.allowed(shape, site.id):
            after = blueprint.resized(shape, site.id)
            if within_caps(after, growth.max_layers, growth.max_parameters):
                yield after


def _slices(spec: RunSpec, instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """Amount used at each decision and the end, float64 (K + 1,), and the budget fraction, float64 (K,)."""
    clock = DecisionClock(spec.budget.amount * instance.budget, spec.budget.decisions)
    if spec.budget.axis in CONTINUOUS:
        passed = np.arange(clock.decisions + 1)
        return passed * clock.slice, passed[:-1] / clock.decisions
    unit = 1 if spec.budget.axis == "steps" else batch_tokens(spec)
    readings = [0]
    while not clock.spent:
        readings.append(readings[-1] + unit * whole_steps(clock.boundary - readings[-1], unit))
        clock.advance(readings[-1])
    used = np.array(readings, float)
    return used, used[:-1] / clock.amount


def course(spec: RunSpec, instance: Instance, seed: int = 0) -> Course:
    """The course of an instance; `seed` draws the law where it names none."""
    slice_ = spec.budget.amount * instance.budget / spec.budget.decisions
    shape = start_shape(spec, VOCABULARY, instance.n_layer)
    law = ScalingLaw.drawn(seed if instance.law is None else instance.law, spec)
    most = sum(_slices(spec, Instance())[1] < spec.optimizer.decay_from)  # one graft a decision
    return course_from(spec, shape, most, law, slice_, *_slices(spec, instance))


def course_from(
    spec: RunSpec, shape: Any, most: int, law: ScalingLaw, slice_: float, used: np.ndarray, fractions: np.ndarray
) -> Course:
    """From a shape, with at most so many grafts; the constants of M laws as arrays make what rests on them (C, M)."""
    known = _classes(spec.model_dump_json(exclude={"laws", "ppo", "fleet"}), shape, most)
    several = (..., None) if isinstance(law.floor, np.ndarray) else ()
    size, per_unit = known.size[several], (batch_tokens(spec) / known.axis_per_step)[several]
    size_loss, per_unit = law.size_loss(size), per_unit * law.pace(size)
    legal = slice_ / known.axis_per_step >= spec.growth.min_optimizer_steps
    spans = np.maximum(1, np.ceil(known.graft_cost / slice_ - 1e-9)).astype(int)
    return Course(known, law, size_loss, per_unit, used, fractions, fractions < spec.optimizer.decay_from, legal, spans)


def bound(spec: RunSpec, instance: Instance, seed: int = 0) -> float:
    """The lowest final loss, nats per token, that any controller can reach; `seed` as for `course`."""
    return float(best_plans(course(spec, instance, seed), 0, 0, np.log(VOCABULARY))[0][0])


def best_plans(course: Course, k: int, at: int, loss: Array) -> tuple[np.ndarray, np.ndarray]:
    """From a loss (of each of M laws) in class `at` before decision k: the lowest final losses, nats, float64 (M,).

    Also the classes that each of them is reached by, in every slice from k on, int64 (M, K); before, zero.
    """
    known, law, size_loss, per_unit, used, _, growing, legal, spans = course
    size_loss, per_unit = (each.reshape(len(legal), -1) for each in (size_loss, per_unit))  # (C, M)
    last, (classes, laws) = len(growing), size_loss.shape
    each = np.arange(classes)
    best, came = np.full((last + 1, classes, laws), np.inf), np.zeros((last + 1, classes, laws), int)
    best[k, at] = loss
    wait = [(each, np.ones_like(legal), np.ones_like(spans), np.zeros_like(known.graft_cost))]
    grafts = [(to, legal, spans, known.graft_cost) for to in known.target]
    for now in range(k, last):
        for target, allowed, lengths, costs in wait + grafts if growing[now] else wait:
            here = np.flatnonzero((target != NONE) & allowed[target] & np.isfinite(best[now, :, 0]))
            to = target[here]  # each class once
            ends = np.minimum(last, now + lengths[to])
            tokens = np.maximum(0.0, used[ends] - used[now] - costs[to])[:, None] * per_unit[to]
            after = law.trained(best[now, here], size_loss[to], tokens)
            came[ends, to] = np.where(after < best[ends, to], (now * classes + here)[:, None], came[ends, to])
            best[ends, to] = np.minimum(best[ends, to], after)
    plans, end, own = np.zeros((laws, last), int), np.full(laws, last), np.arange(laws)
    to = best[last].argmin(axis=0)
    for now in reversed(range(k, last)):
        plans[:, now] = to
        begun, before = np.divmod(came[end, to, own], classes)
        to, end = np.where(begun == now, before, to), np.where(begun == now, now, end)
    return best[last].min(axis=0), plans


def followed(course: Course, k: int, at: int, loss: np.ndarray, plans: np.ndarray) -> np.ndarray:
    """Final losses of plans int64 (P, K) by each of M laws, nats, float64 (P, M), from `loss` in `at` before k."""
    known, law, size_loss, per_unit, used = course[:5]
    before, owed = np.full(len(plans), at), np.zeros(len(plans))
    for now in range(k, plans.shape[1]):
        to, amount = plans[:, now], used[now + 1] - used[now]
        owed = owed + np.where(to == before, 0.0, known.graft_cost[to])
        paid, before = np.minimum(owed, amount), to
        owed, tokens = owed - paid, (amount - paid)[:, None] * per_unit[to]
        loss = law.trained(loss, size_loss[to], tokens)
    return loss


def best_fixed_schedule(spec: RunSpec, instances: Iterable[Instance], *, seed: int = 0) -> list[Entry]:
    """The schedule of lowest mean final loss found by local search; `seed` also draws unnamed laws."""
    simulator, random = Simulator(spec, instances, seed), stream(seed, "schedule search")
    found = []
    for start in range(STARTS):
        dense = random.random(simulator.decisions) < start / STARTS
        schedule = np.where(dense, random.integers(0, len(simulator.blueprints), simulator.decisions), NONE)
        before, value = np.inf, float(simulator.losses(schedule[None]).mean())
        while value < before - 1e-6:
            found.append((value, schedule))
            others = _neighbours(schedule, len(simulator.blueprints))
            values = simulator.losses(others).mean(axis=1)
            before, value, schedule = value, float(values.min()), others[values.argmin()]
    return simulator.entries(min(found, key=lambda pair: pair[0])[1])


def _neighbours(schedule: np.ndarray, blueprints: int) -> np.ndarray:
    """Schedules (M, K) with one decision changed or two swapped."""
    last = len(schedule)
    changes = [([k], [choice]) for k in range(last) for choice in range(NONE, blueprints)]
    changes += [([k, k + move], schedule[[k + move, k]]) for move in MOVES for k in range(last - move)]
    others = np.tile(schedule, (len(changes), 1))
    for other, (places, choices) in zip(others, changes, strict=True):
        other[places] = choices
    return np.unique(others, axis=0)


class Simulator:
    """Plays schedules on instances; a schedule's numbers index `blueprints`, and `decisions` is K."""

    def __init__(self, spec: RunSpec, instances: Iterable[Instance], seed: int = 0) -> None:
        self.blueprints = tuple(spec.growth.blueprints)
        self._of = spec.budget.decisions
        self.decisions = sum(k / self._of < spec.optimizer.decay_from for k in range(self._of))
        self._groups: dict[tuple[int, int], dict[int, Course]] = {}  # those with the same classes and decisions
        for place, each in enumerate(course(spec, instance, seed) for instance in instances):
            self._groups.setdefault((id(each.classes), len(each.growing)), {})[place] = each

    def losses(self, schedules: np.ndarray) -> np.ndarray:
        """Final losses, nats, float64 (M, I), of schedules int64 (M, K)."""
        places = [place for group in self._groups.values() for place in group]
        played = [self._played(list(group.values()), schedules) for group in self._groups.values()]
        return np.hstack(played)[:, np.argsort(places)]

    def _played(self, courses: list[Course], schedules: np.ndarray) -> np.ndarray:
        known = courses[0].classes
        law = ScalingLaw(*np.array([astuple(course.law) for course in courses]).T)
        parts = map(np.array, list(zip(*courses, strict=True))[2:])
        size_loss, per_unit, used, fractions, growing, legal, spans = parts
        last = growing.shape[1]
        due = np.searchsorted([self._at(k) for k in range(self.decisions)], fractions, side="right")
        order = np.argsort(schedules == NONE, axis=1, kind="stable")  # decisions with a graft first
        grafts = np.pad(np.take_along_axis(schedules, order, 1), ((0, 0), (0, 1)), constant_values=NONE)  # (M, K + 1)
        when = np.where(grafts == NONE, last + 1, np.pad(order, ((0, 0), (0, 1))))
        rows, each = np.arange(len(schedules))[:, None], np.arange(len(used))
        at, played, free_from = (np.zeros((len(rows), len(each)), int) for _ in range(3))
        loss = np.full(at.shape, np.log(VOCABULARY))
        for k in range(last):
            free = free_from <= k
            blueprint = grafts[rows, played]
            to = known.target[blueprint, at]
            grows = free & growing[:, k] & (when[rows, played] < due[:, k])
            grows &= (to != NONE) & legal[each, to]
            at, played = np.where(grows, to, at), played + grows
            ends = np.minimum(last, k + np.where(grows, spans[each, at], 1))
            amount = used[each, ends] - used[:, k] - np.where(grows, known.graft_cost[at], 0.0)
            tokens = np.where(free, np.maximum(0.0, amount) * per_unit[each, at], 0.0)
            loss = law.trained(loss, size_loss[each, at], tokens)
            free_from = np.where(free, ends, free_from)
        return loss

    def entries(self, schedule: np.ndarray) -> list[Entry]:
        """The schedule in the form that the schedule arm plays."""
        return [(self._at(k), self.blueprints[graft]) for k, graft in enumerate(schedule) if graft != NONE]

    def _at(self, k: int) -> float:
        """Half a slice before decision k, as a policy reads the fraction in single precision."""
        return round(max(0.0, (k - 0.5) / self._of), 6)
