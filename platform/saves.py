"""Saves: the newest state of each episode under way, in one place that every worker sees.

A place is a path, or a URI of a filesystem that pyarrow knows (`s3://bucket/runs`, `gs://…`, `hdfs://…`, `file:///…`;
https://arrow.apache.org/docs/python/filesystems.html). Below it lies a folder an episode, with one checkpoint in it
(`platform/checkpoint.py`). Writing is a thread's work; a write that fails is said once, and `failed` tells of it.

Object stores rename nothing, so there a checkpoint's manifest is sent last: without it, or with one that does not fit
what lies beside it, the checkpoint is not there.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs
from torch import Tensor

from esper.platform.checkpoint import MANIFEST, STATE, TENSORS, Checkpoints, read, write
from esper.platform.errors import UserError


class Saves:
    """The saves below a place; one process writes an episode's at a time.

    Args:
        place: a path, or a URI.

    Raises:
        UserError: no such kind of URI, or it cannot be reached.
    """

    def __init__(self, place: str) -> None:
        self._folder: Path | None = None
        self._remote: tuple[fs.FileSystem, str] | None = None
        if "://" not in place:
            self._folder = Path(place)
        else:
            try:
                self._remote = fs.FileSystem.from_uri(place)
            except (ValueError, OSError) as error:
                reason = str(error).splitlines()[0].rstrip(".")
                raise UserError(
                    f"fleet.storage is {place!r}, which cannot be used ({reason}): give a path that every node sees, "
                    "or a URI such as s3://bucket/folder."
                ) from None
        self._open: tuple[int, Checkpoints] | None = None  # of the episode saved last

    @property
    def failed(self) -> str | None:
        """Why the last save that was tried is not there, as a sentence; None when it is."""
        return self._open[1].failed if self._open is not None else None

    def save(self, episode: int, number: int, values: Any, tensors: dict[str, Tensor]) -> None:
        """Hand a state over and return at once (`Checkpoints.save`)."""
        self._checkpoints(episode).save(number, values, tensors)

    def load(self, episode: int) -> tuple[Any, dict[str, Tensor]] | None:
        """Values and tensors of an episode's newest save; None where there is no whole one."""
        try:
            return self._checkpoints(episode).latest()[1:]
        except (UserError, OSError):
            return None

    def drop(self, episode: int) -> None:
        """Remove an episode's saves, if there are any."""
        self._close()
        if self._folder is not None:
            shutil.rmtree(self._folder / _name(episode), ignore_errors=True)
        else:
            assert self._remote is not None
            system, root = self._remote
            with contextlib.suppress(OSError):
                system.delete_dir(f"{root}/{_name(episode)}")

    def keep_only(self, episodes: list[int]) -> None:
        """Remove the saves of all other episodes: dropped ones, and those whose worker died after their end."""
        kept = {_name(episode) for episode in episodes}
        if self._folder is not None:
            names = [path.name for path in self._folder.glob("episode-*")]
        else:
            assert self._remote is not None
            found = self._remote[0].get_file_info(fs.FileSelector(self._remote[1], allow_not_found=True))
            names = [info.base_name for info in found if info.base_name.startswith("episode-")]
        for name in names:
            if name not in kept:
                self.drop(int(name.rpartition("-")[2]))

    def flush(self) -> None:
        """Wait until what was handed over is there, or has failed."""
        if self._open is not None:
            self._open[1].flush()

    def _checkpoints(self, episode: int) -> Checkpoints:
        if self._open is None or self._open[0] != episode:
            self._close()
            if self._folder is not None:
                opened = Checkpoints(self._folder / _name(episode))
            else:
                assert self._remote is not None
                system, root = self._remote
                opened = RemoteCheckpoints(system, f"{root}/{_name(episode)}")
            self._open = (episode, opened)
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


class RemoteCheckpoints(Checkpoints):
    """`Checkpoints` whose folder is on a pyarrow filesystem: each is written on this machine, then sent.

    Args:
        system: the filesystem.
        path: of the folder there.
    """

    def __init__(self, system: fs.FileSystem, path: str) -> None:
        super().__init__(Path(path))
        self._newest = -1  # what is there does not count: whoever begins anew has dropped it
        self._system, self._path = system, path

    def latest(self) -> tuple[int, Any, dict[str, Tensor]]:
        """As `Checkpoints.latest`, of what lies on the filesystem."""
        self.flush()
        newest = max(self._names(), default=None)
        if newest is None:
            raise UserError(f"{self._path} holds no checkpoint: start the run anew.")
        with tempfile.TemporaryDirectory(prefix="esper-saves-") as folder:
            for file in (STATE, TENSORS, MANIFEST):
                there = f"{self._path}/{newest}/{file}"
                fs.copy_files(there, str(Path(folder) / file), source_filesystem=self._system)
            return int(newest.rpartition("-")[2]), *read(Path(folder))

    def _write(self, number: int, state: Any, tensors: dict[str, Tensor]) -> None:
        name = f"number-{number:09d}"
        with tempfile.TemporaryDirectory(prefix="esper-saves-") as folder:
            local = Path(folder) / name
            write(local, state, tensors)
            self._system.create_dir(f"{self._path}/{name}", recursive=True)
            for file in (STATE, TENSORS, MANIFEST):
                there = f"{self._path}/{name}/{file}"
                fs.copy_files(str(local / file), there, destination_filesystem=self._system)
        for older in self._names():
            if older < name:
                self._system.delete_dir(f"{self._path}/{older}")

    def _names(self) -> list[str]:
        found = self._system.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return [info.base_name for info in found if info.base_name.startswith("number-")]


def below(place: str, folder: str) -> str:
    """A folder of one's own below a place that several may share."""
    if "://" not in place:
        return str(Path(place).expanduser().absolute() / folder)
    head, mark, query = place.partition("?")
    return f"{head.rstrip('/')}/{folder}{mark}{query}"


def _name(episode: int) -> str:
    return f"episode-{episode:09d}"
