"""The episodes in flight on the driver's disk: a file each, a line a decision, written before the order is sent.

A restarted driver resends each last order; a file goes once a whole checkpoint has learned from its episode.
"""

from pathlib import Path

from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.journal import Journal, read_entries
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.episode import InFlight

VERSION = 2


class EpisodeJournal:
    """The journals in a folder, which the first line creates; one process writes them."""

    def __init__(self, folder: Path, space: TelemetrySpace) -> None:
        self._folder, self._space = folder, space
        self._open: dict[int, Journal | None] = {}  # None: it could not be written, and ends before its episode

    def begin(self, episode: InFlight) -> None:
        """Note that an episode starts."""
        self.remove([episode.number])
        self._write(episode.number, {"version": VERSION, **episode.head()})

    def note(self, episode: InFlight) -> None:
        """Note an episode's last observation, its outcome and the choice made on it."""
        self._write(episode.number, episode.entry())
        if episode.ended:
            self._close(episode.number)

    def remove(self, numbers: list[int]) -> None:
        """Delete the journals of these episodes."""
        for number in numbers:
            self._close(number)
            self._path(number).unlink(missing_ok=True)

    def numbers(self) -> list[int]:
        """Numbers of the episodes, ascending."""
        return sorted(int(path.stem) for path in self._folder.glob("*.jsonl") if path.stem.isdigit())

    def read(self, number: int) -> InFlight | None:
        """An episode to resume; None without its start, a UserError where it is damaged or of another format."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            entries = read_entries(path)
            if not entries:
                return None
            head, *rest = entries
            if head["version"] != VERSION:
                raise ValueError(f"it is of version {head['version']}, and this code reads {VERSION}")
            return InFlight.replayed(head, rest, self._space)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the episode in {path} is damaged ({type(error).__name__}: {error}): delete that file to lose the "
                "episode, and resume again."
            ) from None

    def _write(self, number: int, line: dict) -> None:
        """A failed write ends the file; the episode goes on, and would resume from there."""
        try:
            if number not in self._open:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._open[number] = Journal(self._path(number))
            journal = self._open[number]
            if journal is not None:
                journal.add(line)
        except OSError as error:
            if None not in self._open.values():
                say(
                    f"the journal in {self._folder} cannot be written ({error.strerror}): the training goes on; make "
                    "room, for what is not written there would be trained again after a death of this process."
                )
            self._close(number)
            self._open[number] = None

    def _close(self, number: int) -> None:
        journal = self._open.pop(number, None)
        if journal is not None:
            journal.close()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:09d}.jsonl"
