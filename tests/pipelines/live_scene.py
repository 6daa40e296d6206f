"""A training to look at, for test_live.py: `live_scene.py MODE FOLDER`, run in a terminal or not."""

import contextlib
import fcntl
import itertools
import os
import signal
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from esper.pipelines.controllers.live import TrainingView
from esper.platform.console import say

ITERATIONS = 4
LOCK = threading.Lock()  # as the dispatcher's: held while something is said, wanted by whoever looks at the workers


def main(mode: str, folder: Path) -> None:
    """A second of iterations, with messages, warnings and results in between."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C in the terminal is for this process
    if mode == "gone":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    looks = itertools.count()

    def workers() -> list:
        time.sleep(0.02)
        with LOCK:
            look = next(looks)
            if mode == "raises":
                raise RuntimeError("nobody\nis there")
            now = {
                "episode": 7,
                "decision": look,
                "budget_used": 0.5,
                "loss": 2.25,
                "parameters": 12345,
                "seconds": 0.4,
            }
            return [SimpleNamespace(worker=i, state="training", action="[red]", **now) for i in range(100)]

    def talk() -> None:
        for i in range(12):
            with LOCK:
                time.sleep(0.02)
                say(f"message {i}: [bold]{'x' * 15 * i}[/bold]")
            time.sleep(0.05)

    say("before")
    with TrainingView(ITERATIONS, 0, workers) as view:
        talker = threading.Thread(target=talk, daemon=True)
        talker.start()
        for i in range(1, ITERATIONS + 1):
            if i == 2:
                (folder / "started").touch()
            time.sleep(30 if mode == "long" and i == 2 else 0.2)
            say(f"said {i}")
            if mode != "gone":
                print(f"stray {i}", file=sys.stderr)
                print(f"result {i}", flush=True)
            view.iteration(i, metrics(i))
        talker.join()
    (folder / "trained").touch()
    if mode != "gone":
        say("after")
    os._exit(0) if mode == "gone" else None  # Python, too, would flush into the terminal


def metrics(i: int) -> dict[str, float]:
    """Of iteration `i`."""
    return {
        "return_mean": 2 + i / 10,
        "episodes": 11.0,
        "decisions": 264.0,
        "wait": 0.8,
        "entropy": 1 - i / 10,
        "explained_variance": i / 10,
        "kl": 0.01 * i,
        "clip_fraction": 0.1,
        "busy": 0.95,
        "lag_mean": 0.5,
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
