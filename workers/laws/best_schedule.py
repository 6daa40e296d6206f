"""The best fixed schedule on surrogate instances: the baseline of a controller that ignores observations.

A schedule is int64 (K,): the blueprint to graft at each of the K growing decisions, or NONE; an illegal graft waits and
delays those after it. M schedules, I instances.
"""

from collections.abc import Iterable
from dataclasses import astuple

import numpy as np

from esper.platform.contracts import Instance
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.workers.laws.oracle import NONE, Course, course
from esper.workers.laws.scaling_law import VOCABULARY, ScalingLaw

STARTS = 4  # starts of the search: the empty schedule and random ones
MOVES = (1, 2, 4)  # decisions by which a graft is moved

Entry = tuple[float, str]  # a schedule file's entry without a site: (budget fraction when due, blueprint)


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
        size_loss, used, fractions, growing, legal, spans = map(np.array, list(zip(*courses, strict=True))[2:])
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
            grows &= (to != NONE) & legal[each, blueprint, to]
            at, played = np.where(grows, to, at), played + grows
            ends = np.minimum(last, k + np.where(grows, spans[each, at], 1))
            amount = used[each, ends] - used[:, k] - np.where(grows, known.graft_cost[at], 0.0)
            tokens = np.where(free, np.maximum(0.0, amount) * known.tokens_per_unit[at], 0.0)
            loss = law.trained(loss, size_loss[each, at], tokens)
            free_from = np.where(free, ends, free_from)
        return loss

    def entries(self, schedule: np.ndarray) -> list[Entry]:
        """The schedule in the form that the schedule arm plays."""
        return [(self._at(k), self.blueprints[graft]) for k, graft in enumerate(schedule) if graft != NONE]

    def _at(self, k: int) -> float:
        """Half a slice before decision k, as a policy reads the fraction in single precision."""
        return round(max(0.0, (k - 0.5) / self._of), 6)
