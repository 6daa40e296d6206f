"""A model is a command line: what was typed arrives checked, and what is wrong is one sentence and exit code 2.

Alone: `pytest tests/pipelines/test_arguments.py`.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from esper.pipelines.common.arguments import Arguments, CommonArguments, Positional, main_guard, parse
from esper.platform.errors import UserError
from esper.platform.storage import write_text

ROOT = Path(__file__).parents[2]


class Toy(CommonArguments):
    """Water one plant."""

    arm: Annotated[Positional[Literal["wait", "tamiyo"]], Field(description="Who decides.")] = "wait"
    rate: Annotated[float | None, Field(gt=0, description="At 50 % or more.")] = None
    dry_run: Annotated[bool, Field(description="Only say what would be done.")] = False


class Needy(Arguments):
    """Needs a name."""

    name: Annotated[Positional[str], Field(description="A name.")]
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> "Needy":
        if self.low > self.high:
            raise UserError("--low must not be above --high: swap them.")
        return self


class Flagged(Arguments):
    """Needs a flag."""

    out: Path


def test_without_arguments_the_defaults_of_the_model_hold():
    assert parse(Toy, []) == Toy()


@pytest.mark.parametrize(
    "argv",
    [["tamiyo", "--seed", "4", "--rate=1e-3", "--dry-run"], ["--seed", "4", "--rate=1e-3", "--dry-run", "tamiyo"]],
)
def test_flags_and_positionals_are_read_in_any_order(argv: list[str]):
    assert parse(Toy, argv) == Toy(arm="tamiyo", seed=4, rate=1e-3, dry_run=True)


def test_overrides_stay_as_they_were_typed():
    typed = ["optimizer.betas=[0.9,0.95]", 'a={"b": 1}', "[1,2]=3", "name=x,y", "n=null"]
    argv = [word for override in typed for word in ("--set", override)]
    assert parse(Toy, argv).set == typed


def test_the_environment_feeds_nothing(monkeypatch: pytest.MonkeyPatch):
    for name in ("SEED", "seed", "TASK", "DATA", "ARM"):
        monkeypatch.setenv(name, "7")
    assert parse(Toy, []) == Toy()


def test_arguments_are_read_only():
    with pytest.raises(ValidationError, match="frozen"):
        parse(Toy, []).seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("model", "argv", "sentence"),
    [
        (Toy, ["--seed", "x"], "--seed x is not allowed: it must be a valid integer; `esper toy --help` lists"),
        (Toy, ["--seed", "-1"], "--seed -1 is not allowed: it must be greater than or equal to 0; `esper toy --help`"),
        (Toy, ["--rate", "0"], "--rate 0 is not allowed: it must be greater than 0"),
        (Toy, ["--seed"], "argument --seed: expected one argument: `esper toy --help` lists"),
        (Toy, ["--sed", "1"], "unknown argument --sed, did you mean --seed: `esper toy --help` lists"),
        (Toy, ["wait", "more"], "unknown argument more: `esper toy --help` lists"),
        (Toy, ["tamyo"], "unknown arm 'tamyo': it must be one of tamiyo, wait. Did you mean 'tamiyo'?"),
        (Toy, ["--data="], "--data is empty: give it a value or leave it out."),
        (Needy, [], "the following arguments are required: name: `esper toy --help` lists"),
        (Flagged, [], "--out is missing: `esper toy --help` lists"),
        (Needy, ["x", "--low", "3"], "--low must not be above --high: swap them."),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(
    model: type[Arguments], argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    ran = []
    assert main_guard(ran.append, model, "esper toy", argv) == 2
    out, err = capsys.readouterr()
    assert not ran
    assert not out
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_the_help_names_flags_placeholders_choices_and_defaults(capsys: pytest.CaptureFixture[str]):
    assert main_guard(lambda arguments: None, Toy, "esper toy", ["--help"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert words.startswith("usage: esper toy [-h] [--preset NAME|FILE]")
    for part in (
        "Water one plant.",
        "One of wait, tamiyo. Who decides. (default: wait)",
        "--seed N Seed of every random stream; 0 or more. (default: 0)",
        "--set KEY.PATH=VALUE",
        "--rate X At 50 % or more.",
        "--dry-run Only say what would be done.",
    ):
        assert part in words
    assert "null" not in text


def _users_error(arguments: Toy) -> None:
    raise UserError("the plant is dry: water it.")


def _ctrl_c(arguments: Toy) -> None:
    raise KeyboardInterrupt


def _ctrl_c_with_advice(arguments: Toy) -> None:
    raise KeyboardInterrupt("saved in runs/1, go on with --resume runs/1.")


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (lambda arguments: None, 0, ""),
        (lambda arguments: 3, 3, ""),
        (_users_error, 2, "error: the plant is dry: water it.\n"),
        (_ctrl_c, 130, "interrupted: stopped before it was done.\n"),
        (_ctrl_c_with_advice, 130, "interrupted: saved in runs/1, go on with --resume runs/1.\n"),
    ],
)
def test_a_run_ends_in_its_exit_code(run, code: int, said: str, capsys: pytest.CaptureFixture[str]):
    assert main_guard(run, Toy, "esper toy", []) == code
    assert capsys.readouterr().err == said


def test_a_full_disk_is_a_sentence(tmp_path, files_of_at_most, capsys):
    def run(arguments: Toy) -> None:
        with files_of_at_most(10):
            write_text(tmp_path / "summary.json", "x" * 100)

    assert main_guard(run, Toy, "esper toy", []) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "summary.json") in error
    assert "File too large" in error
    assert error.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    def run(arguments: Toy) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main_guard(run, Toy, "esper toy", [])


def test_neither_torch_nor_ray_is_imported():
    code = "import sys\nimport esper.pipelines.common.arguments\n"
    code += "sys.exit(bool({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
