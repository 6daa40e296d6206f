"""The best fixed schedule on a set of surrogate instances: what a controller reaches that decides without looking.

Chosen on training instances by local search, and played as `policies/schedule.py` plays it: an entry is due from its
decision on, one a decision, in order, and one that is not legal waits (and holds those behind it). The simulator plays
many schedules on many instances at once, over the classes of `workers/clairvoyant.py`.

A schedule is searched as a word of K letters: the blueprint to graft at each decision, or none. Its neighbours differ
in one letter, or have two letters swapped; the search goes to the best neighbour while there is a better one, from
several starts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from esper.platform.contracts import Instance
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec
from esper.policies.schedule import Entry
from esper.workers.laws.oracle import NONE, Classes, classes, legal, slices_of, spans
from esper.workers.laws.scaling_law import VOCABULARY, Law

STARTS = 4  # words that the search sets out from: none, and some at random
MOVES = (1, 2, 4)  # decisions by which a letter is moved


def best_fixed_schedule(spec: RunSpec, instances: Iterable[Instance], *, seed: int = 0) -> list[Entry]:
    """The schedule with the lowest mean final loss over the instances that local search finds.

    Args:
        spec: of the runs.
        instances: to choose it on.
        seed: of the search's starts, and of the law of an instance that names none.
    """
    simulator = Simulator(spec, instances, seed)
    decisions, letters = simulator.moments, len(simulator.blueprints)
    random = stream(seed, "schedule search")
    found: list[tuple[float, np.ndarray]] = []
    for start in range(STARTS):
        dense = random.random(decisions) < start / STARTS
        word = np.where(dense, random.integers(0, letters, decisions), NONE)
        found.append(_climb(simulator, word, letters))
    return simulator.entries(min(found, key=lambda pair: pair[0])[1])


def simulated_losses(
    spec: RunSpec, entries: Sequence[Entry], instances: Iterable[Instance], *, seed: int = 0
) -> np.ndarray:
    """Final loss of each instance under a schedule, nats, float64 (I,): what playing it gives."""
    simulator = Simulator(spec, instances, seed)
    return simulator.losses(simulator.word(entries)[None])[0]


def _climb(simulator: "Simulator", word: np.ndarray, letters: int) -> tuple[float, np.ndarray]:
    """The best word in reach, and its mean loss."""
    value = float(simulator.losses(word[None]).mean())
    while True:
        others = _neighbours(word, letters)
        values = simulator.losses(others).mean(axis=1)
        best = int(values.argmin())
        if values[best] >= value - 1e-6:
            return value, word
        value, word = float(values[best]), others[best]


def _neighbours(word: np.ndarray, letters: int) -> np.ndarray:
    """Words (M, K): another letter at one decision, or two decisions' letters swapped."""
    others = []
    for k in range(len(word)):
        for letter in range(NONE, letters):
            if letter != word[k]:
                others.append(word.copy())
                others[-1][k] = letter
        for move in MOVES:
            if k + move < len(word) and word[k] != word[k + move]:
                others.append(word.copy())
                others[-1][[k, k + move]] = word[[k + move, k]]
    return np.unique(np.array(others), axis=0)


@dataclass(frozen=True)
class _Group:
    """Instances that start alike: I of them, K slices (the shorter filled up with empty ones), C classes.

    Attributes:
        places: among all instances, int64 (I,).
        known: their classes.
        law: of arrays (I,).
        size_loss: float64 (I, C).
        used: on the budget's axis at each decision and at the end, float64 (I, K + 1).
        growing: whether the rate does not decay yet, bool (I, K).
        due: letters of a word that are due at each decision, int64 (I, K).
        legal: bool (I, B, C), by the class that a graft leads to.
        spans: int64 (I, C), likewise.
    """

    places: np.ndarray
    known: Classes
    law: Law
    size_loss: np.ndarray
    used: np.ndarray
    growing: np.ndarray
    due: np.ndarray
    legal: np.ndarray
    spans: np.ndarray


class Simulator:
    """Plays words on instances.

    Args:
        spec: of the runs.
        instances: to play on.
        seed: of the law of an instance that names none.

    Attributes:
        blueprints: what the letters stand for.
        moments: decisions at which growing is allowed: the length of a word.
    """

    def __init__(self, spec: RunSpec, instances: Iterable[Instance], seed: int = 0) -> None:
        instances = list(instances)
        self._decisions, self._count = spec.budget.decisions, len(instances)
        self.blueprints = tuple(spec.growth.blueprints)
        self.moments = sum(k / self._decisions < spec.optimizer.decay_from for k in range(self._decisions))
        starts = np.array([instance.n_layer or spec.host.n_layer for instance in instances])
        self._groups = []
        for n_layer in np.unique(starts):
            places = np.flatnonzero(starts == n_layer)
            self._groups.append(self._group(spec, places, [instances[i] for i in places], int(n_layer), seed))

    def _group(
        self, spec: RunSpec, places: np.ndarray, instances: Sequence[Instance], n_layer: int, seed: int
    ) -> _Group:
        known, slices = classes(spec, n_layer), [slices_of(spec, instance) for instance in instances]
        laws = [Law.drawn(seed if instance.law is None else instance.law, spec) for instance in instances]
        constants: dict[str, Any] = {f.name: np.array([getattr(law, f.name) for law in laws]) for f in fields(Law)}
        longest = max(len(each.amounts) for each in slices)
        filled = [np.pad(each.amounts, (0, longest - len(each.amounts))) for each in slices]
        fractions = np.array([np.pad(s.fractions, (0, longest - len(s.fractions)), constant_values=1) for s in slices])
        at = np.array([self._at(k) for k in range(self.moments)])
        return _Group(
            places=places,
            known=known,
            law=Law(**constants),
            size_loss=np.array([law.size_loss(known.size) for law in laws]),
            used=np.pad(np.cumsum(filled, axis=1), ((0, 0), (1, 0))),
            growing=fractions < spec.optimizer.decay_from,
            due=np.searchsorted(at, fractions, side="right"),
            legal=np.array([legal(spec, each, known) for each in slices]),
            spans=np.array([spans(each, known) for each in slices]),
        )

    def losses(self, words: np.ndarray) -> np.ndarray:
        """Final losses, nats, float64 (M, I), of words int64 (M, K)."""
        found = np.zeros((len(words), self._count))
        for group in self._groups:
            found[:, group.places] = self._played(group, words)
        return found

    def _played(self, group: _Group, words: np.ndarray) -> np.ndarray:
        known, everyone = group.known, np.arange(len(group.places))
        last = group.used.shape[1] - 1
        rows = np.arange(len(words))[:, None]
        order = np.argsort(words == NONE, axis=1, kind="stable")  # decisions with a graft first
        letters = np.pad(np.take_along_axis(words, order, 1), ((0, 0), (0, 1)), constant_values=NONE)  # (M, K + 1)
        when = np.where(letters == NONE, last + 1, np.pad(order, ((0, 0), (0, 1))))
        shape = len(words), len(everyone)
        at, played, free_from = (np.zeros(shape, int) for _ in range(3))
        loss = np.full(shape, np.log(VOCABULARY))
        for k in range(last):
            free = free_from <= k
            letter = letters[rows, played]
            to = known.target[letter, at]
            grafts = free & group.growing[:, k] & (when[rows, played] < group.due[:, k]) & (to != NONE)
            grafts &= group.legal[everyone, letter, to]
            at, played = np.where(grafts, to, at), played + grafts
            ends = np.minimum(last, k + np.where(grafts, group.spans[everyone, at], 1))
            amount = group.used[everyone, ends] - group.used[:, k] - np.where(grafts, known.graft_cost[at], 0.0)
            tokens = np.where(free, np.maximum(0.0, amount) * known.tokens_per_unit[at], 0.0)
            loss = group.law.trained(loss, group.size_loss[everyone, at], tokens)
            free_from = np.where(free, ends, free_from)
        return loss

    def entries(self, word: np.ndarray) -> list[Entry]:
        """The word as a schedule."""
        return [
            Entry(at=self._at(k), blueprint=self.blueprints[letter]) for k, letter in enumerate(word) if letter != NONE
        ]

    def word(self, entries: Sequence[Entry]) -> np.ndarray:
        """The word that `entries` gives back as this schedule."""
        word = np.full(self.moments, NONE)
        for entry in entries:
            word[round(entry.at * self._decisions + 0.5 * (entry.at > 0))] = self.blueprints.index(entry.blueprint)
        return word

    def _at(self, k: int) -> float:
        """Half a slice before decision k: a policy reads the budget's fraction in single precision."""
        return round(max(0.0, (k - 0.5) / self._decisions), 6)
