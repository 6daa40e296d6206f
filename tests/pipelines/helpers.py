"""What tests of several pipelines do: wait, read a summary, spell flags, make a controller."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esper.policies.simic.net import ControllerNet


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def summary_of(folder: Path) -> dict[str, Any]:
    return read(folder, "summary.json")


def sets(*settings: str) -> list[str]:
    """Each with its `--set`."""
    return [word for setting in settings for word in ("--set", setting)]


def planned(folder: Path, grafts: dict[float, str]) -> list[str]:
    """Flags of a schedule, budget fraction → blueprint, which is written into a folder."""
    entries = [{"at": at, "blueprint": blueprint} for at, blueprint in grafts.items()]
    (folder / "plan.json").write_text(json.dumps(entries))
    return ["--schedule", str(folder / "plan.json")]


def start(command: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`esper COMMAND` in a process of its own, whose output is added to a file."""
    with log.open("ab") as file:
        module = [sys.executable, "-m", f"esper.pipelines.{command}"]
        return subprocess.Popen([*module, *arguments], stdout=file, stderr=file, start_new_session=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 240) -> None:
    """Until it holds, and no longer than a process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process ended"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


class Harm:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def made_net(seed: int = 0, scale: float = 1.0, hidden: int = 16) -> ControllerNet:
    """An untrained controller with opinions; at scale 0 it has none, and only waits."""
    torch.manual_seed(seed)
    net = ControllerNet(hidden)
    with torch.no_grad():
        net.score[-1].weight.normal_(0, scale)  # pyright: ignore[reportCallIssue]
    return net
