"""TrainingLog: the metrics of a controller's iterations, a line each in `history.jsonl` with its time.

It outlives its process: a resumed training reads it, takes out what its checkpoint does not know of yet, and sends the
rest to MLflow again, where a point with its own time stamp is the same point.
"""

import json
import math
from pathlib import Path

from esper.platform.storage import write_text
from esper.platform.tracking import Tracker, milliseconds

FILE = "history.jsonl"  # in the output folder
OWN = ("iteration", "time")  # what a line has beside the metrics


class TrainingLog:
    """The log in a training's output folder.

    Args:
        out: the folder.
        begin: iterations done before; those of the file that come after are taken out.

    Attributes:
        lines: iteration, time stamp in milliseconds and metrics of each iteration; what is not finite is so here, and
            null in files, since JSON has no NaN.
    """

    def __init__(self, out: Path, begin: int) -> None:
        self._path = out / FILE
        self.lines: list[dict[str, float]] = []
        if self._path.exists():
            whole = [line for line in self._path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["iteration"] <= begin]
            write_text(self._path, "".join(kept))
            self.lines = [_read(json.loads(line)) for line in kept]

    def add(self, iteration: int, metrics: dict[str, float]) -> int:
        """Note an iteration that has just ended, and return its time stamp."""
        self.lines.append({"iteration": iteration, "time": milliseconds(), **metrics})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_json(self.lines[-1])) + "\n")
        return int(self.lines[-1]["time"])

    def metrics(self) -> list[dict[str, float]]:
        """Of each iteration, without its number and time."""
        return [{key: value for key, value in line.items() if key not in OWN} for line in self.lines]

    def send(self, tracker: Tracker) -> None:
        """Give MLflow every line."""
        for line, metrics in zip(self.lines, self.metrics(), strict=True):
            tracker.log(metrics, int(line["iteration"]), at=int(line["time"]))


def as_json(line: dict[str, float]) -> dict[str, float | None]:
    """A line as files have it."""
    return {key: value if math.isfinite(value) else None for key, value in line.items()}


def _read(line: dict[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in line.items()}
