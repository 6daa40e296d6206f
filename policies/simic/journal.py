"""The episodes in flight on the driver's disk: a line a decision, written before the order is sent.

All episodes share a file, so that a turn of the dispatcher costs one write. Each checkpoint begins another file, and
deletes those whose episodes have all been learned from. A restarted driver resends each last order.
"""

from collections.abc import Iterable
from pathlib import Path

from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.journal import Journal, read_entries
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.episode import Decision, arrays


class EpisodeJournal:
    """The files of a folder, which the first line creates; one process writes them, a thread at a time."""

    def __init__(self, folder: Path, space: TelemetrySpace) -> None:
        self._folder, self._space = folder, space
        self._episodes: dict[Path, set[int]] = {}  # numbers of each file's episodes
        self._journal: Journal | None = None  # the newest file; another begins with the next line
        self._full = False  # nothing can be written any more

    def read(self) -> dict[int, list[Decision]]:
        """Each episode's decisions, up to where a deleted line is missing; a UserError where a file is damaged."""
        found: dict[int, list[Decision]] = {}
        for path in sorted(self._folder.glob("[0-9]*.jsonl")):
            try:
                decisions = [Decision.model_validate(entry) for entry in read_entries(path)]
                for each in decisions:
                    arrays(each.observation[None], self._space)
            except (TypeError, ValueError) as error:
                what = f"{path} is damaged, or another version's ({' '.join(str(error).split())})"
                mend = "delete that file to train again what it holds of the episodes in flight, and resume again"
                raise UserError(f"{what}: {mend}.") from None
            self._episodes[path] = {each.episode for each in decisions}
            for each in decisions:
                if each.k == len(episode := found.setdefault(each.episode, [])):
                    episode.append(each)
        return found

    def note(self, decisions: list[Decision]) -> None:
        """Add decisions; after a failed write nothing is added, and episodes would resume there."""
        if self._full or not decisions:
            return
        try:
            if self._journal is None:
                last = max((int(path.stem) for path in self._episodes), default=-1)
                self._journal = Journal(self._folder / f"{last + 1:09d}.jsonl")
                self._episodes[self._journal.path] = set()
            self._journal.write(b"".join(each.model_dump_json().encode() + b"\n" for each in decisions))
            self._episodes[self._journal.path].update(each.episode for each in decisions)
        except OSError as error:
            self._full = True
            say(
                f"the journal in {self._folder} cannot be written ({error.strerror}): the training goes on; make room, "
                "and resume it, for what is not written there is trained again after a death of this process."
            )

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Begin another file, and delete those that hold none of these episodes."""
        self.close()
        kept = set(numbers)
        for path in [path for path, episodes in self._episodes.items() if not episodes & kept]:
            path.unlink(missing_ok=True)
            del self._episodes[path]

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
