"""RecordedRun: a recording of runs (`esper record`) played again, decision by decision, without training.

By the reference clock equal seed, budget, start and actions give equal numbers: the runs of one instance are a tree,
whose branches are the rows that were chosen there. The legal rows of an observation are those recorded from it; else it
is the run's, as are reward and loss, to the bit. Another row is taken as WAIT, or where nobody waited as the first
that is recorded; `unrecorded` counts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from esper.platform.contracts import GraftAction, Transition
from esper.platform.errors import UserError, in_a_sentence
from esper.platform.law_file import FittedLaws
from esper.platform.recording import Manifest, telemetry_of
from esper.platform.telemetry import Telemetry

CHOICE = ("run", "row", "reward")  # columns that are not of the observation


@dataclass(frozen=True)
class RecordedInstance:
    """What runs of a recording have in common."""

    seed: int
    budget: float  # on the spec's axis
    start: str  # the host's layers at the start, as JSON
    best: float  # lowest final loss among them, nats per token
    root: int  # the first run's row of `decisions` at the start


class RecordedRun:
    """Plays the recording in a folder; raises UserError where it holds none, or one that is damaged."""

    def __init__(self, folder: Path) -> None:
        manifest, self._decisions, runs = Manifest.read(folder)
        self.spec, self.space, self._folder = manifest.spec, manifest.space, folder
        self.instances: dict[int, RecordedInstance] = {}
        self._after: dict[int, dict[int, int]] = {}  # row of `decisions` → action → row of the next observation
        with in_a_sentence(f"the recording in {folder} is of no runs that could be", "record them again"):
            self._grow(runs.to_pylist())
        self.reset()

    def reset(self, instance: RecordedInstance | None = None, seed: int = 0) -> Telemetry:
        """Start at an instance (default: the first), whose seed it is; returns the first observation."""
        self.instance = instance or next(iter(self.instances.values()))
        self.actions: list[int] = []  # taken so far
        self.unrecorded = 0  # decisions whose row was not recorded
        return self._move(self.instance.root)

    def step(self, action: GraftAction) -> Transition:
        """Go on along a recorded row, by the rule above for another; raises UserError at the end or for a late one."""
        if self.ended or action.sequence != self.telemetry.sequence:
            raise UserError("the episode has ended, or the action answers an older observation: reset, or look again.")
        branches = self._after[self._at]
        row = action.index if action.index in branches else min(branches)
        self.unrecorded += row != action.index
        self.actions.append(row)
        reward = self._edges[self._at, row]
        telemetry = self._move(branches[row])
        return Transition(telemetry, reward, self.ended, info={"summary": self.summary()} if self.ended else {})

    @property
    def ended(self) -> bool:
        return self._at not in self._after

    def summary(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        own = {"seed": self.instance.seed, "budget": self.instance.budget, "best": self.instance.best}
        return {**own, "val_loss": self.loss, "actions": self.actions, "unrecorded": self.unrecorded}

    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> NoReturn:
        raise UserError("a recording cannot try what was not recorded: controllers that ask for it need real runs.")

    def forecast(self, laws: FittedLaws) -> NoReturn:
        self.twins((), 0)

    def _move(self, row: int) -> Telemetry:
        self._at, found = row, self._decisions.slice(row, 1).to_pylist()[0]
        self.loss = float(found["val_loss"])
        with in_a_sentence(f"row {row} of the recording in {self._folder} is of no run", "record the runs again"):
            self.telemetry = telemetry_of(found, self.space)
        if not self.ended:
            recorded = np.isin(np.arange(self.space.candidates), list(self._after[row]))
            self.telemetry = replace(self.telemetry, mask=self.telemetry.mask & recorded)
        return self.telemetry

    def _grow(self, runs: Sequence[dict[str, Any]]) -> None:
        """Merge the runs to a tree; raises UserError where equal actions led two of them to other numbers."""
        table, seen = self._decisions, self._decisions.drop_columns(CHOICE)
        of, rows, rewards = (table[name].to_pylist() for name in CHOICE)
        self._edges: dict[tuple[int, int], float] = {}
        node = -1
        for i, run in enumerate(of):
            own = runs[run]
            if i == 0 or of[i - 1] != run:
                same = {name: own[name] for name in ("seed", "budget", "start")}
                kept = self.instances.setdefault(own["instance"], RecordedInstance(**same, best=np.inf, root=i))
                best = min(kept.best, own["val_loss"])
                self.instances[own["instance"]], node = replace(kept, best=best), kept.root
            else:
                before, action = node, rows[i - 1]
                node = self._after.setdefault(before, {}).setdefault(action, i)
                equal = self._edges.setdefault((before, action), rewards[i - 1]) == rewards[i - 1]
                if not equal or (node != i and seen.slice(node, 1) != seen.slice(i, 1)):
                    other = runs[of[node]]
                    told = f"runs {other['run']} ({other['arm']}) and {run} ({own['arm']}) of seed {own['seed']}"
                    mend = "record runs of one code and machine, by the reference clock, and none of arm lag"
                    raise UserError(f"{told} took the same actions and came to other numbers: {mend}.")
