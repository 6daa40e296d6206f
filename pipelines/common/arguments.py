"""Command lines from frozen pydantic models: a field is a flag, its description the help, its rules the checks.

A pipeline states its arguments once, as a model, and ends in two lines:

    def main(argv: list[str] | None = None) -> int:
        return main_guard(run, TrainArguments, "esper train", argv)

`pydantic-settings` turns the fields into argparse's arguments (kebab-case flags, `CliPositionalArg` for positionals);
only the command line feeds them, never the environment. A field's `title` is its placeholder in the help. Imports are
kept light (no torch, no ray), so that `--help` answers at once.
"""

import errno
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import CliSettingsSource

from esper.platform.console import say
from esper.platform.errors import UserError, unknown

PLACEHOLDERS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}  # type, as pydantic-settings writes it: ours
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors of a place for files rather than of Esper."""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

T = TypeVar("T", bound=BaseModel)


class Arguments(BaseModel):
    """Base of every command line: read-only, and no argument that the model does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CommonArguments(Arguments):
    """What every pipeline takes."""

    preset: Annotated[
        str | None,
        Field(title="NAME|FILE", description="A preset's name or a JSON file (default: chosen by the device)."),
    ] = None
    task: Annotated[str, Field(title="NAME", description="What the model learns.")] = "tinystories"
    data: Annotated[
        Path | None,
        Field(description="A text file, a folder of them, prepared shards, or a source's name."),
    ] = None
    out: Annotated[
        Path | None, Field(title="DIR", description="A new or empty folder for the results (default: one in runs/).")
    ] = None
    seed: Annotated[int, Field(ge=0, description="Seed of every random stream; 0 or more.")] = 0
    set: Annotated[
        list[str],
        Field(title="KEY.PATH=VALUE", description="Change one value of the preset; may be given again for others."),
    ] = []


def parse(model_class: type[T], argv: list[str] | None = None, prog: str = "esper") -> T:
    """Read a command line into `model_class`.

    Args:
        model_class: Its fields are the arguments, its docstring the head of the help.
        argv: The arguments, without the program's name; None for the process's own.
        prog: How the user calls it (`esper train`), for the help and the errors.

    Raises:
        UserError: An argument is unknown, missing or not allowed.
        SystemExit: With code 0, after `--help` was printed.
    """
    parser = _Parser(prog=prog, description=model_class.__doc__, allow_abbrev=False)
    CliSettingsSource(
        model_class,  # pyright: ignore[reportArgumentType]  (it reads fields and config only; any model has them)
        root_parser=parser,
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        add_argument_method=lambda parser, *names, **keywords: parser.add_field(model_class, *names, **keywords),
    )
    # The source's own reading of the values would take `[0.9,0.95]` and `a,b` apart: here they stay what was typed.
    typed = vars(parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv))
    given = {name: value for name, value in typed.items() if value is not PydanticUndefined}
    for name, value in given.items():
        if value == "":
            raise UserError(f"{parser.shown[name]} is empty: give it a value or leave it out.")
    try:
        return model_class.model_validate(given)
    except ValidationError as error:
        raise _first_error(error.errors(include_url=False)[0], model_class, parser) from None


def check_only_resume(arguments: CommonArguments, out: Path, *allowed: str) -> None:
    """Refuse what is given beside `--resume`, but for fields that are allowed.

    Raises:
        UserError: something is.
    """
    given = sorted(arguments.model_fields_set - {"resume", *allowed})
    shown = [name if name == "arm" else f"--{name.replace('_', '-')}" for name in given]  # the one positional
    if shown:
        raise UserError(f"--resume takes everything from {out}: leave out {', '.join(shown)}.")


def main_guard(run: Callable[[T], int | None], model_class: type[T], prog: str, argv: list[str] | None = None) -> int:
    """Parse the command line, call `run` with it, and turn what went wrong into a sentence and an exit code.

    Returns:
        What `run` returns (None counts as 0); 0 after `--help`; 2 for a user's error or a full disk; 130 for Ctrl-C, or
        the KeyboardInterrupt's own `exit_code`, with its message where the pipeline raised its own ("saved at …").
        Any other exception is a bug: it passes through, with its traceback.
    """
    try:
        return run(parse(model_class, argv, prog)) or 0
    except UserError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        what = error.filename or "a file"
        say(
            f"error: {what} cannot be written or read ({error.strerror}): make room, or mend the place; what was "
            "written before is there."
        )
        return 2
    except KeyboardInterrupt as interrupt:
        say(f"interrupted: {str(interrupt) or 'stopped before it was done.'}")
        return getattr(interrupt, "exit_code", INTERRUPTED)
    except SystemExit as stop:
        if stop.code:
            raise
        return 0


class _Parser(ArgumentParser):
    """argparse's parser, whose errors are one sentence and an exception instead of a usage text and an exit."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.shown: dict[str, str] = {}  # field name → how the user writes it: `--seed`, `arm`

    def add_field(self, model_class: type[BaseModel], *names: str, **keywords: Any) -> None:
        """Add one field as pydantic-settings describes it, with our placeholders and defaults in the help."""
        name = keywords.get("dest", names[0])
        field = model_class.model_fields[name]
        self.shown[name] = names[0]
        text = re.sub(r" ?\(default: (null|\[\]|True|False)\)$", "", keywords["help"])  # says nothing to a person
        if "metavar" in keywords:
            plain = re.sub(r"^\{(.*),null\}$|^list\[(.*)\]$", r"\1\2", keywords["metavar"])
            keywords["metavar"] = field.title or PLACEHOLDERS.get(plain, plain)
        if names[0] == name and _choices(field):  # a positional shows only its name
            text = f"One of {', '.join(_choices(field))}. {text}"
        self.add_argument(*names, **{**keywords, "help": text})

    def error(self, message: str) -> NoReturn:
        """Argparse's own complaints (unknown flag, missing value or positional) as a UserError."""
        stray = message.removeprefix("unrecognized arguments: ")
        if stray != message:
            first = stray.split()[0]
            close = get_close_matches(first.split("=")[0], self.shown.values(), n=1)
            message = f"unknown argument {first}" + (f", did you mean {close[0]}" if close else "")
        raise UserError(f"{message}: {self.advice()}")

    def advice(self) -> str:
        """Where the user finds what is allowed."""
        return f"`{self.prog} --help` lists what is allowed."


def _choices(field: FieldInfo) -> list[str]:
    """The words a field accepts where it is a Literal, else none."""
    return [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []


def _first_error(error: ErrorDetails, model_class: type[BaseModel], parser: _Parser) -> UserError:
    """One sentence for pydantic's first complaint."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    if not error["loc"]:  # a rule over several fields
        return UserError(f"{cause or error['msg']}: {parser.advice()}")
    name = str(error["loc"][0])
    shown = parser.shown[name]
    if error["type"] == "missing":
        return UserError(f"{shown} is missing: {parser.advice()}")
    choices = _choices(model_class.model_fields[name])
    if choices:
        return unknown(shown, error["input"], choices)
    rule = str(cause) if cause else error["msg"].removeprefix("Input should be ").split(", unable")[0]
    wanted = rule if cause else f"it must be {rule}"
    return UserError(f"{shown} {error['input']} is not allowed: {wanted}; {parser.advice()}")
