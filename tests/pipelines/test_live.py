"""What a person sees of a training: the live view in a terminal, plain lines elsewhere, and a picture in the end."""

import contextlib
import io
import re
import sys
import threading
import time

import pytest
from matplotlib.image import imread
from rich.console import Console

from esper.pipelines.controllers.live import TrainingView
from esper.pipelines.controllers.training_picture import COLUMNS, PANELS, training_picture
from esper.platform.console import said_to, say
from tests.pipelines.helpers import wait_for

METRICS = {"return_mean": 2.5, "episodes": 11.0, "decisions": 264.0, "wait": 0.8, "entropy": 0.5}
METRICS |= {"explained_variance": 0.25, "busy": 0.95}
MESSAGES = [f"message {i}: [bold]{'x' * 15 * i}[/bold]" for i in range(12)]
UP = "\x1b[1A\x1b[2K"  # how rich goes back over its last drawing, line by line


class Screen(io.StringIO):
    """A terminal, which may be closed."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)

    def seen(self) -> list[str]:
        """The lines that are not empty, those scrolled away too; long ones whole."""
        lines = [""]
        for part in re.findall(r"\x1b\[1A\x1b\[2K|\x1b\[\??[\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if part == UP:
                lines.pop()
            if part in (UP, "\r"):
                lines[-1] = ""
            elif part == "\n":
                lines.append("")
            elif part[0] != "\x1b":
                lines[-1] += part
        return [line.rstrip() for line in lines if line.strip()]

    @property
    def cursor(self) -> bool:
        return self.getvalue().rfind("\x1b[?25h") >= self.getvalue().rfind("\x1b[?25l")


def open_terminal(monkeypatch, kind: str = "xterm") -> Screen:
    """Not a fixture: pytest changes the streams between a fixture and its test."""
    terminal = Screen()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, terminal)
    for name, value in {"TERM": kind, "COLUMNS": "100", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    return terminal


def test_in_a_terminal_everything_said_stands_above_one_view(monkeypatch):
    screen = open_terminal(monkeypatch)
    row = {"episode": 7, "decision": 3, "budget_used": 0.5, "loss": 2.25, "parameters": 12345, "seconds": 0.4}
    training = [{"worker": i, "state": "training", **row, "action": "[red]"} for i in range(100)]
    workers = [*training, *[{"state": "starting"}] * 50]

    def talk():
        for message in MESSAGES:
            time.sleep(0.02)
            say(message)

    say("before")
    with TrainingView(4, 0, lambda: workers) as view:
        talker = threading.Thread(target=talk)
        talker.start()
        for i in range(1, 5):
            print(f"stray {i}", file=sys.stderr)
            print(f"result {i}")
            view.iteration(i, METRICS | {"return_mean": 2 + i / 10}, {i: f"Once {i}.", 9: None})
            wait_for(lambda i=i: f"iteration {i}/4" in screen.getvalue())
        talker.join()
        assert screen.cursor  # also if it were killed now
        wait_for(lambda: screen.seen()[-1].strip() == "...")
        line = r" +\d+  training +7 +3 +50%  2.2500 +12,345 +0.4  \[red\]"
        assert sum(bool(re.match(line, each)) for each in screen.seen()) > 5
        assert "workers: 100 training, 50 starting" in screen.seen()
    say("after")
    lines = screen.seen()
    assert (lines[0], lines[-1], screen.cursor) == ("before", "after", True)
    assert [line for line in lines if line.startswith("message")] == MESSAGES  # each once, whole, in order
    for what in ("stray", "result"):
        assert [line for line in lines if line.startswith(what)] == [f"{what} {i}" for i in range(1, 5)]
    [head] = [number for number, line in enumerate(lines) if line.startswith("iteration")]  # no leftover of older ones
    assert lines[head].startswith("iteration 4/4")
    assert {"message", "stray", "result", "before"} >= {line.split()[0] for line in lines[:head]}
    assert re.match(r"return mean +\+2.400 +▁▃▅█", lines[head + 1].replace("▆", "▅"))
    assert [line for line in lines if "writes" in line] == ["episode 4 writes: Once 4."]
    assert not any("training" in line for line in lines)  # the workers are gone from the last picture


def test_ctrl_c_leaves_the_terminal_sane(monkeypatch):
    screen = open_terminal(monkeypatch)
    with contextlib.suppress(KeyboardInterrupt), TrainingView(4, 0, list):
        say("last")
        raise KeyboardInterrupt
    assert screen.cursor
    assert [line.split()[0] for line in screen.seen()] == ["last", "iteration"]
    assert sys.stderr is screen


def test_workers_or_a_terminal_that_cannot_be_seen_cost_no_training(monkeypatch):
    screen = open_terminal(monkeypatch)
    with TrainingView(4, 0, lambda: 1 // 0) as view:  # pyright: ignore[reportArgumentType]
        wait_for(lambda: "live view: ZeroDivisionError: integer division or modulo by zero" in screen.seen())
        screen.gone = True
        drawn = screen.getvalue()
        say("lost")
        view.iteration(1, METRICS)
    assert screen.getvalue() == drawn
    assert sys.stderr is screen  # and not rich's, which would go on drawing


def test_in_a_dumb_terminal_or_a_pipe_plain_lines_and_results_apart(monkeypatch, capsys):
    screen = open_terminal(monkeypatch, "dumb")
    with TrainingView(4, 0, list) as view:
        view.iteration(1, METRICS)
    told = "iteration 1/4: return mean +2.500, explained variance +0.25, entropy 0.50, wait 80%, episodes 11"
    assert screen.getvalue().startswith(f"  {told}, busy 95%, ")
    monkeypatch.undo()
    with TrainingView(4, 0, list) as view:
        view.iteration(1, METRICS, {3: "Once."})
        print("result")
    out, err = capsys.readouterr()
    assert (out, told in err, err.endswith("\nepisode 3 writes: Once.\n")) == ("result\n", True, True)


def test_no_line_is_wider_than_the_terminal_and_values_that_are_no_number_are_marked():
    view = TrainingView(20, 0, lambda: [{"worker": i, "state": "resting", "action": "a" * 99} for i in range(30)])
    with said_to(lambda message: None):
        for number, kl in enumerate((0, 0.5, float("nan"), 1, float("inf")), 1):
            view.iteration(number, {**METRICS, "kl": kl})
    for width in range(12, 140, 9):
        console = Console(file=io.StringIO(), width=width)
        with console.capture() as capture:
            console.print(view.drawing())
        lines = capture.get().splitlines()
        assert lines[0].startswith("iteration 5/")
        assert all(len(line) <= width for line in lines)
    assert "▁▅!█!" in capture.get()


FULL = {name: 0.5 for names in PANELS.values() for name in names}
ALL = (COLUMNS, -(-len(PANELS) // COLUMNS))
GAPS = [FULL | {"kl": float(kl), "value_loss": float(kl)} for kl in ("1", "nan", "inf")]


@pytest.mark.parametrize(("rows", "grid"), [(GAPS, ALL), ([{"return_mean": 1.0, "kl": 0.1}, {"failures": 1}], (3, 1))])
def test_what_was_logged_has_its_panel(tmp_path, rows, grid):
    training_picture([{"iteration": float(i), **row} for i, row in enumerate(rows, 7)], tmp_path / "training.png")
    height, width, _ = imread(tmp_path / "training.png").shape
    assert (round(width / (3.6 * 120)), round(height / (2.5 * 120))) == grid
    training_picture([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
