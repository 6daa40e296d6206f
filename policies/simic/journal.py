"""The episodes that have not been learned from for good, on the driver's disk: a file each, a line a decision.

A line is written before the order that follows from it is sent. So when the driver dies, the next one finds each
episode with its choices and what chose them, sends its last order again, and learns from those that have ended. An
episode's file goes when a checkpoint that has learned from it is whole.
"""

from pathlib import Path

from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.journal import Journal, read_entries
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.episode import InFlight

VERSION = 2


class EpisodeJournal:
    """The journals in a folder, written by one process.

    Args:
        folder: made at the first line.
        space: what telemetry looks like.
    """

    def __init__(self, folder: Path, space: TelemetrySpace) -> None:
        self._folder, self._space = folder, space
        self._open: dict[int, Journal | None] = {}  # None: it could not be written, and ends before its episode

    def begin(self, episode: InFlight) -> None:
        """Note that an episode starts."""
        self.remove([episode.number])
        self._write(episode.number, {"version": VERSION, **episode.head()})

    def note(self, episode: InFlight) -> None:
        """Note an episode's last observation, what came with it, and the choice made on it."""
        self._write(episode.number, episode.entry())
        if episode.ended:
            self._close(episode.number)

    def remove(self, numbers: list[int]) -> None:
        """Forget episodes: learned from for good, or given up."""
        for number in numbers:
            self._close(number)
            self._path(number).unlink(missing_ok=True)

    def numbers(self) -> list[int]:
        """Of the episodes that are there, ascending."""
        return sorted(int(path.stem) for path in self._folder.glob("*.jsonl") if path.stem.isdigit())

    def read(self, number: int) -> InFlight | None:
        """An episode as far as it is there, to be gone on with in place; None where not even its start is.

        Raises:
            UserError: it is of another version, or damaged before its last line.
        """
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
        """A line that cannot be written ends its file; the episode goes on, and would be taken up from there."""
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
