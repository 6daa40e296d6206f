"""Command lines from frozen pydantic models: a field is a flag, its description the help, its rules the checks.

Parsing must be fast: a module that states arguments imports torch, Ray and MLflow inside its `run` only.
"""

import errno
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from esper.platform.console import say
from esper.platform.errors import UserError, unknown

PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
POSITIONAL = object()

V = TypeVar("V")
T = TypeVar("T", bound=BaseModel)
Positional = Annotated[V, POSITIONAL]  # `arm: Positional[str]` is an argument without a flag


class Arguments(BaseModel):
    """Base of every command line; refuses unknown arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CommonArguments(Arguments):
    """What every pipeline takes."""

    preset: Annotated[
        str | None,
        Field(title="NAME|FILE", description="A preset's name or a JSON file (default: chosen by the device)."),
    ] = None
    task: Annotated[str, Field(title="NAME", description="What the model learns.")] = "tinystories"
    data: Annotated[
        Path | None, Field(description="A text file, a folder of them, prepared shards, or a source's name.")
    ] = None
    out: Annotated[
        Path | None, Field(title="DIR", description="A new or empty folder for the results (default: one in runs/).")
    ] = None
    seed: Annotated[int, Field(ge=0, description="Seed of every random stream; 0 or more.")] = 0
    set: Annotated[
        list[str],
        Field(title="KEY.PATH=VALUE", description="Change one value of the preset; may be given again for others."),
    ] = []


class ResumableArguments(CommonArguments):
    """Arguments of a resumable command; beside `--resume` it takes `beside_resume` only."""

    beside_resume: ClassVar[tuple[str, ...]] = ()

    resume: Annotated[
        Path | None, Field(title="DIR", description="Go on with the work in this folder, which has all that it takes.")
    ] = None

    @model_validator(mode="after")
    def _takes_all_from_the_folder(self) -> Self:
        given = sorted(self.model_fields_set - {"resume", *self.beside_resume})
        if self.resume is not None and given:
            shown = ", ".join(_shown(name, type(self).model_fields[name]) for name in given)
            raise UserError(f"--resume takes everything from {self.resume}: leave out {shown}.")
        return self


def parse(model_class: type[T], argv: list[str] | None = None, prog: str = "esper") -> T:
    """Read a command line (None: the process's own); the model's docstring heads the help. Raises UserError."""
    parser = _Parser(prog=prog, description=model_class.__doc__, allow_abbrev=False)
    for name, field in model_class.model_fields.items():
        parser.add_argument(_shown(name, field), **_keywords(field))
    typed = vars(parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv))
    given = {name: value for name, value in typed.items() if value is not None}  # a positional that was left out
    for name, value in given.items():
        if value == "":
            shown = _shown(name, model_class.model_fields[name])
            raise UserError(f"{shown} is empty: give it a value or leave it out.")
    try:
        return model_class.model_validate(given)
    except ValidationError as error:
        raise _first_error(error.errors(include_url=False)[0], model_class, prog) from None


def main_guard(run: Callable[[T], int | None], model_class: type[T], prog: str, argv: list[str] | None = None) -> int:
    """Parse the command line, call `run`, and turn what goes wrong into a sentence and an exit code.

    Codes: `run`'s own (None is 0), 2 for a UserError or a full disk, KeyboardInterrupt's `exit_code` or 130. Any other
    exception is a bug, and keeps its traceback.
    """
    try:
        return run(parse(model_class, argv, prog)) or 0
    except UserError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        problem = f"{error.filename or 'a file'} cannot be written or read ({error.strerror})"
        say(f"error: {problem}: make room, or mend the place; what was written before is there.")
        return 2
    except KeyboardInterrupt as interrupt:
        say(f"interrupted: {str(interrupt) or 'stopped before it was done.'}")
        return getattr(interrupt, "exit_code", INTERRUPTED)
    except SystemExit as stop:
        if stop.code:
            raise
        return 0


def choose(
    prog: str, what: str, commands: Mapping[str, tuple[str, Callable[[list[str]], int]]], argv: list[str] | None
) -> int:
    """Run the command (name → summary, function of the other arguments) that a line names; else list all."""
    line = sys.argv[1:] if argv is None else argv
    name = line[0] if line else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, commands)) + 1
        lines = [f"  {name:<{width}} {summary}" for name, (summary, _) in commands.items()]
        end = f"`{prog} {what.upper()} --help` lists what one of them takes."
        print("\n".join([f"usage: {prog} {what.upper()} [ARGUMENTS]", "", *lines, "", end]))
        return 0
    if name not in commands:
        say(f"error: {unknown(what, name, commands)}")
        return 2
    return commands[name][1](line[1:])


class _Parser(ArgumentParser):
    """Raises UserError with one sentence instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        stray = message.removeprefix("unrecognized arguments: ")
        if stray != message:
            first = stray.split()[0]
            close = get_close_matches(first.split("=")[0], self._option_string_actions, n=1)
            message = f"unknown argument {first}" + (f", did you mean {close[0]}" if close else "")
        raise UserError(f"{message}: {_advice(self.prog)}")


def _advice(prog: str) -> str:
    return f"`{prog} --help` lists what is allowed."


def _shown(name: str, field: FieldInfo) -> str:
    return name if POSITIONAL in field.metadata else f"--{name.replace('_', '-')}"


def _kind(field: FieldInfo) -> Any:
    parts = get_args(field.annotation)
    return parts[0] if type(None) in parts else field.annotation


def _choices(field: FieldInfo) -> list[str]:
    return [str(choice) for choice in get_args(_kind(field))] if get_origin(_kind(field)) is Literal else []


def _keywords(field: FieldInfo) -> dict[str, Any]:
    kind, choices, text = _kind(field), _choices(field), field.description or ""
    if not field.is_required() and str(field.default) not in ("None", "False", "[]"):
        text += f" (default: {field.default})"
    keywords = {"help": text.replace("%", "%%"), "default": SUPPRESS}
    if kind is bool:
        return {**keywords, "action": "store_true"}
    if POSITIONAL in field.metadata:
        return {**keywords, **({} if field.is_required() else {"nargs": "?"})}
    shown = "{" + ",".join(choices) + "}" if choices else PLACEHOLDERS.get(kind, "TEXT")
    action = "append" if get_origin(kind) is list else "store"
    return {**keywords, "metavar": field.title or shown, "action": action}


def _first_error(error: ErrorDetails, model_class: type[BaseModel], prog: str) -> UserError:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    name = str(error["loc"][0])
    field = model_class.model_fields[name]
    shown, rule = _shown(name, field), error["msg"].removeprefix("Input should be ").split(", unable")[0]
    if error["type"] == "missing":
        return UserError(f"{shown} is missing: {_advice(prog)}")
    if choices := _choices(field):
        return unknown(shown, error["input"], choices)
    return UserError(f"{shown} {error['input']} is not allowed: it must be {rule}; {_advice(prog)}")
