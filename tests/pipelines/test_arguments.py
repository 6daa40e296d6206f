"""A model is a command line: what was typed arrives checked, and what is wrong is one sentence and exit code 2."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

import esper
from esper.pipelines.common import cli
from esper.pipelines.common.arguments import ResumableArguments, command, flag, parse
from esper.platform.errors import UserError
from esper.platform.storage import write_text

ROOT = Path(__file__).parents[2]


class Toy(ResumableArguments):
    """Water one plant."""

    arm: Literal["wait", "tamiyo"] = flag("wait", "Who decides.", positional=True)
    rate: float | None = flag(None, "At 50 % or more.", gt=0)
    dry_run: bool = flag(False, "Only say what would be done.")


def test_flags_and_positionals_are_read_in_any_order_and_the_rest_are_defaults():
    typed = ["optimizer.betas=[0.9,0.95]", 'a={"b": 1}', "[1,2]=3", "name=x,y", "n=null"]  # stay as they are
    flags = ["--seed", "4", "--rate=1e-3", "--dry-run", *(word for override in typed for word in ("--set", override))]
    wanted = Toy(arm="tamiyo", seed=4, rate=1e-3, dry_run=True, set=tuple(typed))
    assert parse(Toy, ["tamiyo", *flags]) == parse(Toy, [*flags, "tamiyo"]) == wanted
    assert parse(Toy, []) == Toy()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--seed", "x"], "seed is 'x': input should be a valid integer"),
        (["--seed", "-1"], "seed is '-1': input should be greater than or equal to 0."),
        (["--seed"], "argument --seed: expected one argument: `esper toy --help` lists"),
        (["wait", "more", "--sed", "1"], "unrecognized arguments: more --sed 1: `esper toy --help` lists"),
        (["tamyo"], "arm is 'tamyo': input should be 'wait' or 'tamiyo'."),
        (["--data="], "an argument is empty: give it a value or leave it out."),
        (["wait", "--resume", "x", "--dry-run"], "--resume takes everything from x: leave out arm, --dry-run."),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(argv, sentence, refused):
    ran = []
    assert refused(command(ran.append, Toy, "esper toy"), argv).startswith(f"error: esper toy: {sentence}")
    assert ran == []


def test_the_help_names_flags_placeholders_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Toy, ["--help"], "esper toy")
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith("usage: esper toy [-h] [--preset NAME|FILE]")
    assert "arm Who decides. (default: wait)" in words
    assert "--seed N Seed of every random stream; 0 or more. (default: 0)" in words
    assert "--rate X At 50 % or more. --dry-run Only say what would be done." in words


def test_a_run_ends_in_its_exit_code_and_a_bug_keeps_its_traceback(tmp_path, files_of_at_most, capsys):
    def ends(outcome: BaseException | int | None) -> tuple[int, str]:
        def run(arguments: Toy) -> int | None:
            if isinstance(outcome, BaseException):
                raise outcome
            with files_of_at_most(10):
                write_text(tmp_path / "summary.json", "x" * (outcome or 0))
            return outcome

        return command(run, Toy, "esper toy")([]), capsys.readouterr().err

    assert ends(None) == (0, "")
    assert ends(3) == (3, "")
    assert ends(UserError("the plant is dry: water it.")) == (2, "error: the plant is dry: water it.\n")
    assert ends(KeyboardInterrupt()) == (130, "interrupted: stopped before it was done.\n")
    assert ends(KeyboardInterrupt("saved in runs/1.")) == (130, "interrupted: saved in runs/1.\n")
    code, said = ends(11)
    assert code == 2
    assert f"{tmp_path / 'summary.json'} cannot be written or read (File too large)" in said
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


def test_esper_runs_the_command_it_is_given(monkeypatch, capsys):
    module = ModuleType("esper.pipelines.train")
    module.main = lambda argv: len(argv)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "esper.pipelines.train", module)
    assert cli.main(["train", "tamiyo", "--seed", "1"]) == 3
    assert cli.main(["--version"]) == cli.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"esper {esper.__version__}\nusage: esper COMMAND")
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert cli.main(["tarin"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean 'train'?\n")


def test_help_imports_neither_torch_nor_ray():
    """So that it answers at once."""
    code = """
import contextlib, sys
from esper.pipelines.common.cli import COMMANDS, main
for words in ([], *([name] for name in COMMANDS), ["policy", "evaluate"]):
    with contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert not {"torch", "ray", "mlflow", "matplotlib"} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "A preset's name or a JSON file. (default: demo)" in " ".join(done.stdout.split())  # of `esper demo`
