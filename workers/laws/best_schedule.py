"""The best fixed schedule on surrogate instances: the baseline of a controller that ignores observations.

A schedule is int64 (K,): the blueprint to graft at each of the K growing decisions, or NONE; an illegal graft waits and
delays those after it. M schedules, I instances.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple

import numpy as np

from esper.platform.contracts import Instance
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.workers.laws.oracle import NONE, Course
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
        grafts = random.integers(0, len(simulator.blueprints), simulator.decisions)
        found.append(_climb(simulator, np.where(dense, grafts, NONE)))
    return simulator.entries(min(found, key=lambda pair: pair[0])[1])


def _climb(simulator: "Simulator", schedule: np.ndarray) -> tuple[float, np.ndarray]:
    value = float(simulator.losses(schedule[None]).mean())
    while True:
        others = _neighbours(schedule, len(simulator.blueprints))
        values = simulator.losses(others).mean(axis=1)
        best = int(values.argmin())
        if values[best] >= value - 1e-6:
            return value, schedule
        value, schedule = float(values[best]), others[best]


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
        courses = [Course.of(spec, instance, seed) for instance in instances]
        alike: dict[tuple[int, int], list[int]] = {}  # instances with the same classes and number of decisions
        for place, course in enumerate(courses):
            alike.setdefault((id(course.classes), len(course.growing)), []).append(place)
        self._groups = [(places, _stacked([courses[place] for place in places])) for places in alike.values()]

    def losses(self, schedules: np.ndarray) -> np.ndarray:
        """Final losses, nats, float64 (M, I), of schedules int64 (M, K)."""
        order = np.concatenate([places for places, _ in self._groups])
        return np.hstack([self._played(courses, schedules) for _, courses in self._groups])[:, np.argsort(order)]

    def _played(self, courses: Course, schedules: np.ndarray) -> np.ndarray:
        known, law, used, last = courses.classes, courses.law, courses.used, courses.growing.shape[1]
        due = np.searchsorted([self._at(k) for k in range(self.decisions)], courses.fractions, side="right")
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
            grows = free & courses.growing[:, k] & (when[rows, played] < due[:, k])
            grows &= (to != NONE) & courses.legal[each, blueprint, to]
            at, played = np.where(grows, to, at), played + grows
            ends = np.minimum(last, k + np.where(grows, courses.spans[each, at], 1))
            amount = used[each, ends] - used[:, k] - np.where(grows, known.graft_cost[at], 0.0)
            tokens = np.where(free, np.maximum(0.0, amount) * known.tokens_per_unit[at], 0.0)
            loss = law.trained(loss, courses.size_loss[each, at], tokens)
            free_from = np.where(free, ends, free_from)
        return loss

    def entries(self, schedule: np.ndarray) -> list[Entry]:
        """The schedule in the form that the schedule arm plays."""
        return [(self._at(k), self.blueprints[graft]) for k, graft in enumerate(schedule) if graft != NONE]

    def _at(self, k: int) -> float:
        """Half a slice before decision k, as a policy reads the fraction in single precision."""
        return round(max(0.0, (k - 0.5) / self._of), 6)


def _stacked(courses: Sequence[Course]) -> Course:
    law = ScalingLaw(*np.array([astuple(course.law) for course in courses]).T)
    names = ("size_loss", "used", "fractions", "growing", "legal", "spans")
    return Course(courses[0].classes, law, *(np.array([getattr(c, name) for c in courses]) for name in names))
