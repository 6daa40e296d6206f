"""A model is a command line: what was typed arrives checked, and what is wrong is one sentence and exit code 2.

Alone: `pytest tests/pipelines/test_arguments.py`.
"""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

import esper
from esper.pipelines.common import cli
from esper.pipelines.common.arguments import Arguments, Positional, ResumableArguments, main_guard, parse
from esper.platform.errors import UserError
from esper.platform.storage import write_text

ROOT = Path(__file__).parents[2]


class Toy(ResumableArguments):
    """Water one plant."""

    arm: Annotated[Positional[Literal["wait", "tamiyo"]], Field(description="Who decides.")] = "wait"
    rate: Annotated[float | None, Field(gt=0, description="At 50 % or more.")] = None
    dry_run: Annotated[bool, Field(description="Only say what would be done.")] = False


class Needy(Arguments):
    """Needs a name and a file."""

    name: Annotated[Positional[str], Field(description="A name.")]
    out: Path

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.name == str(self.out):
            raise UserError("--out must not be called as the plant is: rename it.")
        return self


def test_flags_and_positionals_are_read_in_any_order_and_the_rest_are_defaults():
    wanted = Toy(arm="tamiyo", seed=4, rate=1e-3, dry_run=True)
    flags = ["--seed", "4", "--rate=1e-3", "--dry-run"]
    assert parse(Toy, ["tamiyo", *flags]) == parse(Toy, [*flags, "tamiyo"]) == wanted
    assert parse(Toy, []) == Toy()


def test_overrides_stay_as_they_were_typed():
    typed = ["optimizer.betas=[0.9,0.95]", 'a={"b": 1}', "[1,2]=3", "name=x,y", "n=null"]
    assert parse(Toy, [word for override in typed for word in ("--set", override)]).set == typed


@pytest.mark.parametrize(
    ("model", "argv", "sentence"),
    [
        (Toy, ["--seed", "x"], "--seed x is not allowed: it must be a valid integer; `esper toy --help` lists"),
        (Toy, ["--seed", "-1"], "--seed -1 is not allowed: it must be greater than or equal to 0; `esper toy --help`"),
        (Toy, ["--seed"], "argument --seed: expected one argument: `esper toy --help` lists"),
        (Toy, ["--sed", "1"], "unknown argument --sed, did you mean --seed: `esper toy --help` lists"),
        (Toy, ["wait", "more"], "unknown argument more: `esper toy --help` lists"),
        (Toy, ["tamyo"], "unknown arm 'tamyo': it must be one of tamiyo, wait. Did you mean 'tamiyo'?"),
        (Toy, ["--data="], "--data is empty: give it a value or leave it out."),
        (Toy, ["wait", "--resume", "x", "--dry-run"], "--resume takes everything from x: leave out arm, --dry-run."),
        (Needy, [], "the following arguments are required: name: `esper toy --help` lists"),
        (Needy, ["x"], "--out is missing: `esper toy --help` lists"),
        (Needy, ["x", "--out", "x"], "--out must not be called as the plant is: rename it."),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(model, argv, sentence, capsys):
    ran = []
    assert main_guard(ran.append, model, "esper toy", argv) == 2
    out, err = capsys.readouterr()
    assert (ran, out) == ([], "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_the_help_names_flags_placeholders_and_defaults(capsys):
    assert main_guard(lambda arguments: None, Toy, "esper toy", ["--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith("usage: esper toy [-h] [--preset NAME|FILE]")
    for part in (
        "Water one plant.",
        "arm Who decides. (default: wait)",
        "--seed N Seed of every random stream; 0 or more. (default: 0)",
        "--set KEY.PATH=VALUE",
        "--rate X At 50 % or more.",
        "--dry-run Only say what would be done.",
    ):
        assert part in words


def raising(error):
    def run(arguments):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (lambda arguments: None, 0, ""),
        (lambda arguments: 3, 3, ""),
        (raising(UserError("the plant is dry: water it.")), 2, "error: the plant is dry: water it.\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted: stopped before it was done.\n"),
        (raising(KeyboardInterrupt("saved in runs/1.")), 130, "interrupted: saved in runs/1.\n"),
    ],
)
def test_a_run_ends_in_its_exit_code(run, code: int, said: str, capsys):
    assert main_guard(run, Toy, "esper toy", []) == code
    assert capsys.readouterr().err == said


def test_a_full_disk_is_a_sentence_and_a_bug_keeps_its_traceback(tmp_path, files_of_at_most, capsys):
    def run(arguments: Toy) -> None:
        with files_of_at_most(10):
            write_text(tmp_path / "summary.json", "x" * 100)

    assert main_guard(run, Toy, "esper toy", []) == 2
    assert f"{tmp_path / 'summary.json'} cannot be written or read (File too large)" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main_guard(raising(ZeroDivisionError()), Toy, "esper toy", [])


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
    code = "import sys; from esper.pipelines.common.cli import COMMANDS, main\n"
    code += "for words in ([], *([name] for name in COMMANDS), ['policy', 'evaluate']):\n"
    code += "    assert main([*words, '--help']) == 0\n"
    code += "    loaded = {'torch', 'ray', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
    code += "    assert not loaded, (words, loaded)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
