"""The live view in real pseudo-terminals, read back through a small terminal emulator; plain lines elsewhere.

Alone: `pytest tests/pipelines/test_live.py`. POSIX only, like Ray's clusters.
"""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live

from esper.pipelines.controllers.live import TrainingView, sparkline
from esper.platform.console import said_to, say
from esper.policies.simic.worker_table import STATES, WorkerView

SCENE = Path(__file__).parent / "live_scene.py"
METRICS = {
    "return_mean": 2.5,
    "episodes": 11.0,
    "decisions": 264.0,
    "wait": 0.8,
    "entropy": 0.5,
    "explained_variance": 0.25,
}
MESSAGES = [f"message {i}: [bold]{'x' * 15 * i}[/bold]" for i in range(12)]


class Terminal:
    """What a person sees of a process: its lines, those scrolled away too, and the cursor. Long lines wrap."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[]]
        self.wrapped: set[int] = set()  # lines that go on in the next
        self.row = self.column = 0
        self.cursor = True

    def feed(self, text: str) -> None:
        for match in re.finditer(r"\x1b\[(\??)(\d*)(?:;\d+)*([A-Za-z])|([^\x1b])", text):
            private, number, command, character = match.groups()
            if character is not None:
                self._put(character)
            elif private:
                assert number == "25", "no mode but the cursor's is touched"
                self.cursor = command == "h"
            elif command == "A":
                self.row = max(0, len(self.lines) - self.rows, self.row - int(number or 1))
            elif command == "K":
                assert number == "2"
                self.lines[self.row] = []
                self.wrapped.discard(self.row)
            else:
                assert command == "m", match.group()

    def text(self) -> list[str]:
        """The lines that are not empty, whole."""
        whole, part = [], ""
        for number, line in enumerate(self.lines):
            part += "".join(line)
            if number not in self.wrapped:
                whole.append(part.rstrip())
                part = ""
        return [line for line in whole if line]

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
            return
        if character != "\n" and self.column == self.columns:
            self.wrapped.add(self.row)
            self.column = 0
            self._down()
        if character == "\n":
            self._down()
            return
        line = self.lines[self.row]
        line.extend(" " * (self.column + 1 - len(line)))
        line[self.column] = character
        self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])


def play(
    tmp_path: Path,
    mode: str = "",
    columns: int = 80,
    at_start: Callable[[int, subprocess.Popen, str], object] = lambda *_: None,
    **env: str,
) -> tuple[Terminal, subprocess.Popen]:
    """Run the scene in a terminal to its end; `at_start` gets it once an iteration has ended, and what it wrote."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    before = termios.tcgetattr(slave)
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment = plain | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | env
    command = [sys.executable, str(SCENE), mode, str(tmp_path)]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    terminal, raw, begun, closed = Terminal(columns, 24), b"", False, False
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if closed:
            time.sleep(0.05)
        elif select.select([master], [], [], 0.05)[0]:
            raw += os.read(master, 65536)
        elif not begun and (tmp_path / "started").exists() and b"iteration 1/" in raw:  # between two pictures
            begun = True
            closed = at_start(master, process, raw.decode()) == "closed"
            if closed:
                os.close(slave)
                os.close(master)
    assert process.poll() is not None, "the scene did not end"
    if not closed:
        while select.select([master], [], [], 0.05)[0]:
            raw += os.read(master, 65536)
        assert termios.tcgetattr(slave) == before
        os.close(slave)
        os.close(master)
    terminal.feed(raw.decode())
    return terminal, process


@pytest.mark.parametrize("columns", [40, 120])
def test_in_a_terminal_everything_said_stands_above_one_view(tmp_path, columns):
    terminal, process = play(tmp_path, columns=columns)
    assert process.returncode == 0
    assert terminal.cursor
    lines = terminal.text()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [line for line in lines if line.startswith("message")] == MESSAGES  # each once, whole, in order
    for what in ("said", "stray", "result"):
        assert [line for line in lines if line.startswith(what)] == [f"{what} {i}" for i in range(1, 5)]
    [head] = [number for number, line in enumerate(lines) if line.startswith("iteration")]  # no leftover of older ones
    assert lines[head].startswith("iteration 4/4")
    assert {"message", "said", "stray", "result", "before"} >= {line.split()[0] for line in lines[:head]}
    assert re.match(r"return mean +\+2.400 +▁▃▅█", lines[head + 1].replace("▆", "▅"))
    assert not any("training" in line for line in lines)  # the workers are gone from the last picture


def test_its_workers_are_shown_and_a_kill_leaves_the_cursor(tmp_path):
    early = Terminal(100, 24)
    _, process = play(tmp_path, "long", 100, at_start=lambda _, process, text: (early.feed(text), process.kill()))
    assert process.returncode == -9
    assert early.cursor
    lines = early.text()
    shown = [line for line in lines if re.match(r" +\d+  training +\d+ +\d+ +50%  2.2500  12,345 +0.4  \[red\]", line)]
    assert len(shown) > 5
    assert lines[-1].endswith("more; of all 100: 100 training")


def test_ctrl_c_leaves_the_terminal_sane(tmp_path):
    terminal, process = play(tmp_path, "long", at_start=lambda master, *_: os.write(master, b"\x03"))
    assert process.returncode == -2  # as by SIGINT
    assert terminal.cursor
    lines = terminal.text()
    assert lines[-1] == "KeyboardInterrupt"
    assert sum(line.startswith("iteration") for line in lines) == 1
    assert not (tmp_path / "trained").exists()


def test_what_is_said_while_the_view_ends_draws_no_second_one(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", written := Tty())
    monkeypatch.setenv("TERM", "xterm")
    with TrainingView(4, 0, list) as view:
        assert view._live is not None
        with view._live.console:  # as whoever ends the view holds it
            late = threading.Thread(target=say, args=("late",))
            late.start()
            time.sleep(0.2)
            view._live.stop()
        late.join()
    terminal = Terminal(80, 24)
    terminal.feed(written.getvalue().replace("\n", "\r\n"))
    assert [line.split()[0] for line in terminal.text()] == ["iteration", "late"]


@pytest.mark.parametrize(("mode", "terminal"), [("raises", "there"), ("gone", "closed")])
def test_workers_or_a_terminal_that_cannot_be_seen_cost_no_training(tmp_path, mode, terminal):
    _, process = play(tmp_path, mode, at_start=lambda *_: terminal)
    assert process.returncode == 0
    assert (tmp_path / "trained").exists()


def test_in_a_dumb_terminal_or_a_pipe_plain_lines_and_results_apart(tmp_path):
    terminal, process = play(tmp_path, columns=200, TERM="dumb")
    assert process.returncode == 0
    command = [sys.executable, str(SCENE), "", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert done.stdout.split("\n") == [*(f"result {i}" for i in range(1, 5)), ""]
    assert "\x1b" not in done.stderr
    for lines in (terminal.text(), done.stderr.splitlines()):
        assert [line for line in lines if line.startswith("message")] == MESSAGES
        told = [re.sub(", [^,]* left$", "", line) for line in lines if "iteration" in line]
        assert len(told) == 4
        assert told[1] == (
            "  iteration 2/4: return +2.200, 11 episodes, wait 80%, entropy 0.80, explained variance +0.20, "
            "workers busy 95%"
        )


def drawn(view: TrainingView, workers: list[WorkerView], width: int, height: int, encoding: str = "utf-8") -> list[str]:
    """The view's lines in a terminal of that size."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    view._live = Live(console=Console(file=file, width=width, height=height))
    view._live.console.print(view.drawing(workers))
    file.flush()
    return file.buffer.getvalue().decode().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_of_a_thousand_workers_those_that_fit_are_shown_and_all_are_counted():
    workers = [WorkerView(i, STATES[i % 3], i, 3, i / 1000, 2.25, 12345, "graft ffn", 0.4) for i in range(1000)]
    lines = drawn(TrainingView(20, 0, lambda: workers), workers, 100, 24)
    assert len(lines) == 23
    assert lines[0].startswith("iteration 0/20 0%, 0s, ? left, first episodes under way")
    assert lines[1].split()[:4] == ["worker", "state", "episode", "decision"]
    assert lines[2].split() == ["0", "starting", "0", "3", "0%", "2.2500", "12,345", "0.4", "graft", "ffn"]
    assert lines[-1] == "and 980 more; of all 1,000: 334 starting, 333 training, 333 resting"


def test_any_size_is_drawn_within_itself():
    workers = [WorkerView(-1, "starting"), *(WorkerView(i, "resting", action="a" * 99) for i in range(30))]
    view = TrainingView(20, 0, lambda: workers)
    with said_to(lambda message: None):
        for number, kl in enumerate((float("inf"), float("nan")), 1):
            view.iteration(number, {**METRICS, "kl": kl})
    for width in range(12, 140, 5):
        for height in (12, 24, 60):
            lines = drawn(view, workers, width, height)
            assert len(lines) < height
            assert all(len(line) <= width for line in lines)
            assert not any("Error" in line for line in lines)
    assert all(line.isascii() for line in drawn(view, workers, 120, 24, "ascii"))


def test_the_latest_values_as_blocks():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0.5, float("nan"), 1, float("inf")]) == "▁▅!█!"
    assert sparkline([3, 3]) == "▁▁"
