"""The episodes in flight on the driver's disk: a file each, a line a decision, written before the order is sent.

A restarted driver resends each last order; a file goes once a whole checkpoint has learned from its episode.
"""

from collections.abc import Container
from pathlib import Path

from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.journal import Journal, read_entries
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.episode import Decision, InFlight, arrays


class EpisodeJournal:
    """The journals in a folder, which the first line creates; one process writes them."""

    def __init__(self, folder: Path, space: TelemetrySpace) -> None:
        self._folder, self._space = folder, space
        self._open: dict[int, Journal] = {}
        self._full = False  # nothing can be written any more

    def numbers(self) -> list[int]:
        """Numbers of the episodes."""
        return [int(path.stem) for path in self._folder.glob("*.jsonl") if path.stem.isdigit()]

    def read(self, number: int) -> list[Decision]:
        """An episode's decisions, none without a file; a UserError where it is damaged or of another version."""
        path = self._path(number)
        try:
            decisions = [Decision.model_validate(entry) for entry in read_entries(path)]
            for each in decisions:
                arrays(each.observation[None], self._space)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the episode in {path} is damaged, or another version's ({' '.join(str(error).split())}): delete that "
                "file to lose the episode, and resume again."
            ) from None
        return decisions

    def note(self, episode: InFlight) -> None:
        """Add an episode's last decision; after a failed write nothing is added, and episodes would resume there."""
        number = episode.number
        try:
            if not self._full:
                journal = self._open.get(number) or self._open.setdefault(number, Journal(self._path(number)))
                journal.add(episode.decisions[-1].model_dump(mode="json"))
        except OSError as error:
            self._full = True
            say(
                f"the journal in {self._folder} cannot be written ({error.strerror}): the training goes on; make room, "
                "and resume it, for what is not written there is trained again after a death of this process."
            )
        if episode.ended and number in self._open:
            self._open.pop(number).close()

    def keep_only(self, numbers: Container[int]) -> None:
        """Delete the journals of all other episodes."""
        for number in self.numbers():
            if number not in numbers:
                if number in self._open:
                    self._open.pop(number).close()
                self._path(number).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        for journal in self._open.values():
            journal.close()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:09d}.jsonl"
