"""What can go wrong with an MLflow store, whether to ask again may help, and how an outage is told."""

import re
import threading
import time
from typing import TYPE_CHECKING

from esper.platform.console import say
from esper.platform.tracking_store import reason, shown

if TYPE_CHECKING:
    from mlflow.entities import Experiment


class NoRunYet(Exception):
    """The parent has no run yet."""


class NoRun(Exception):
    """The parent will not have a run."""


class ExperimentDeleted(Exception):
    """The experiment has been deleted."""

    def __init__(self, group: "Experiment") -> None:
        self.experiment_id, self.name = group.experiment_id, group.name


class Outage:
    """Whether a store takes anything at the moment: told once for all its trackers."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._down = False
        self._answered = -float("inf")

    def failed(self, began: float, error: Exception) -> None:
        """Nothing came of a request made at `began` (`time.monotonic`)."""
        with self._lock:
            if self._down or began < self._answered:
                return
            self._down = True
        say(
            f"MLflow at {shown(self._uri)} takes nothing at the moment ({reason(error)}): the run goes on, and what "
            "is kept in its journal is sent later."
        )

    def answered(self) -> None:
        """A request went through."""
        with self._lock:
            self._answered = time.monotonic()
            was_down, self._down = self._down, False
        if was_down:
            say(f"MLflow at {shown(self._uri)} is back: what was kept is being sent.")


def is_final(error: Exception) -> bool:
    """Whether to ask again would be refused again: the request or the address was wrong, or the run is gone."""
    if isinstance(error, (ExperimentDeleted, ImportError, TypeError, AttributeError)):
        return True
    if isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)):  # a folder of a local store
        return True
    if re.search("IntegrityError|UniqueViolation", str(error)):  # another process has just made the same data set
        return False
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (408, 429)
