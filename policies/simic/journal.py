"""Journal: every episode that has not been learned from for good, on the driver's disk, a line a decision.

A line is written before the order that follows from it is sent. So when the driver dies, nothing that a worker was
asked for is unknown: the next driver finds each episode with its choices and what chose them, sends its last order
again, and has the finished ones to learn from. An episode's file goes when a checkpoint that has learned from it is
whole.

A line is JSON; arrays in it are base64 of float32. A last line without its end, of a driver that died writing it, is
cut off.
"""

import base64
import errno
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from esper.platform.console import say
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.policies.simic.flight import Choice, Flight

VERSION = 1


@dataclass(frozen=True)
class Found:
    """What a journal holds.

    Attributes:
        flights: episodes under way.
        ended: whole episodes, numpy'ised, in the order in which they ended.
        blank: numbers of episodes of which not even the start is there.
        next_episode: above every number there.
    """

    flights: list[Flight]
    ended: list[SingleAgentEpisode]
    blank: list[int]
    next_episode: int


class Journal:
    """The journal in a folder, written by one process.

    Args:
        folder: made at the first line.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends = 0
        self._broken: set[int] = set()  # episodes whose file ends before they do

    def begin(self, flight: Flight) -> None:
        """Note that an episode starts."""
        instance = None if flight.instance is None else flight.instance.model_dump(mode="json")
        head = {"version": VERSION, "episode": flight.number, "seed": flight.seed, "instance": instance}
        self._broken.discard(flight.number)
        self._write(flight.number, head, new=True)

    def note(self, flight: Flight) -> None:
        """Note a flight's last observation, with the reward that came with it, and the choice made on it."""
        episode, choice = flight.episode, flight.choice
        assert episode is not None
        last = {name: _packed(array) for name, array in episode.get_observations(-1).items()}
        line: dict[str, Any] = {"observation": last, "reached": flight.reached, "expected": flight.expected}
        if len(episode):
            line |= {
                "reward": float(episode.get_rewards(-1)),
                "info": episode.get_infos(-1),
                "terminated": episode.is_terminated,
                "truncated": episode.is_truncated,
            }
        if episode.is_done:
            self._ends += 1
            line["ended"] = self._ends
        elif choice is not None:
            line["choice"] = {
                "index": choice.index,
                "logits": _packed(choice.logits),
                "log_p": float(choice.log_p),
                "value": float(choice.value),
                "weights": choice.weights,
            }
            line["doing"] = flight.doing
        self._write(flight.number, line)

    def remove(self, numbers: list[int]) -> None:
        """Forget episodes: learned from for good, or given up."""
        for number in numbers:
            Path(self._name(number)).unlink(missing_ok=True)
            self._broken.discard(number)

    def read(self) -> Found:
        """What is there; it is gone on with in place.

        Raises:
            UserError: a file is of another version, or damaged before its last line.
        """
        flights: list[Flight] = []
        ended: list[tuple[int, SingleAgentEpisode]] = []
        blank: list[int] = []
        newest = -1
        for path in sorted(self._folder.glob("*.jsonl")):
            if not re.fullmatch(r"\d+\.jsonl", path.name):
                continue
            newest = max(newest, int(path.stem))
            lines = _lines(path)
            if not lines:
                blank.append(int(path.stem))
                continue
            try:
                flight = _flight(lines)
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, f"{type(error).__name__}: {error}") from None
            if flight.episode is not None and flight.episode.is_done:
                ended.append((lines[-1]["ended"], flight.episode.to_numpy()))
            else:
                flights.append(flight)
        self._ends = max((order for order, _ in ended), default=0)
        whole = [episode for _, episode in sorted(ended, key=lambda pair: pair[0])]
        return Found(flights, whole, blank, newest + 1)

    def _write(self, number: int, line: dict[str, Any], *, new: bool = False) -> None:
        """A line that cannot be written ends its file; the episode goes on, and would be taken up from there."""
        if number in self._broken:
            return
        data, place = _encoded(line), self._name(number)
        try:
            if new:
                self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(place, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if new else os.O_APPEND), 0o644)
            try:
                size = os.fstat(file).st_size
                if os.write(file, data) < len(data):  # the disk is full: no half of a line before the next
                    os.ftruncate(file, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)
        except OSError as error:
            if not self._broken:
                say(
                    f"the journal in {self._folder} cannot be written ({error.strerror}): the training goes on; make "
                    "room, for what is not written there would be trained again after a death of this process."
                )
            self._broken.add(number)

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:09d}.jsonl"


def _flight(lines: list[dict[str, Any]]) -> Flight:
    """An episode from its lines."""
    head, *rest = lines
    if head["version"] != VERSION:
        raise ValueError(f"it is of version {head['version']}, and this code reads {VERSION}")
    instance = None if head["instance"] is None else Instance.model_validate(head["instance"])
    flight = Flight(head["episode"], head["seed"], instance)
    for line in rest:
        observation = {name: _unpacked(packed) for name, packed in line["observation"].items()}
        if flight.episode is None:
            flight.begin(observation)
        else:
            flight.go_on(observation, line["reward"], line["info"], line["terminated"], line["truncated"])
        flight.reached, flight.expected = line["reached"], line["expected"]
        if "choice" in line:
            kept = line["choice"]
            flight.choose(Choice(**{**kept, "logits": _unpacked(kept["logits"])}))
            flight.doing = line["doing"]
    return flight


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what follows the last is cut off."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"the episode in {path} is damaged ({what}): delete that file to lose the episode, and resume again."
    )


def _packed(array: np.ndarray) -> dict[str, Any]:
    array = np.ascontiguousarray(array, np.float32)
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode("ascii")}


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(packed["float32"], validate=True), np.float32)
    return data.reshape(packed["shape"]).copy()


def _encoded(line: dict[str, Any]) -> bytes:
    """JSON has no infinity; an info may, and then says nothing."""
    try:
        text = json.dumps(line, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(line), allow_nan=False, separators=(",", ":"))
    return text.encode("ascii") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, dict) else value
