"""Command lines from frozen pydantic models: a field is a flag, its description the help, its rules the checks.

Parsing must be fast: a module that states arguments imports torch, Ray and MLflow inside its `run` only.
"""

import errno
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeVar, get_args, get_origin

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from esper.platform.console import say
from esper.platform.errors import UserError, unknown
from esper.platform.frozen import Frozen

PLACEHOLDERS = {int: "N", float: "X", Path: "PATH"}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

T = TypeVar("T", bound=Frozen)
Command = Callable[..., int]  # takes the arguments (none: the process's own), returns the exit code


def flag(default: Any, text: str, shown: str | None = None, *, positional: bool = False, **rules: Any) -> Any:
    """A field of a command line: its default (`...`: it must be given), its help, its placeholder, pydantic's rules."""
    return Field(default, description=text, title=shown, json_schema_extra={"positional": positional}, **rules)


class CommonArguments(Frozen):
    """What every command that trains takes."""

    preset: str | None = flag(None, "A preset's name or a JSON file (default: chosen by the device).", "NAME|FILE")
    task: str = flag("tinystories", "What the model learns.", "NAME")
    data: Path | None = flag(None, "A text file, a folder of them, images, prepared data, or a source's name.")
    out: Path | None = flag(None, "A new or empty folder for the results (default: one in runs/).", "DIR")
    seed: int = flag(0, "Seed of every random stream; 0 or more.", ge=0)
    set: tuple[str, ...] = flag((), "Change one value of the preset; may be given again for others.", "KEY.PATH=VALUE")


class ResumableArguments(CommonArguments):
    """Arguments of a resumable command; beside `--resume` it takes `beside_resume` only."""

    beside_resume: ClassVar[tuple[str, ...]] = ()

    resume: Path | None = flag(None, "Go on with the work in this folder, which has all that it takes.", "DIR")

    @model_validator(mode="after")
    def _takes_all_from_the_folder(self) -> Self:
        given = sorted(self.model_fields_set - {"resume", *self.beside_resume})
        if self.resume is not None and given:
            shown = ", ".join(_shown(name, type(self).model_fields[name]) for name in given)
            raise ValueError(f"--resume takes everything from {self.resume}: leave out {shown}.")
        return self


def parse(model_class: type[T], argv: list[str] | None = None, prog: str = "esper") -> T:
    """Read a command line (None: the process's own); the model's docstring heads the help. Raises UserError."""
    parser = _Parser(prog=prog, description=model_class.__doc__, allow_abbrev=False)
    for name, field in model_class.model_fields.items():
        parser.add_argument(_shown(name, field), **_keywords(name, field))
    typed = vars(parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv))
    given = {name: value for name, value in typed.items() if value is not None}  # a positional that was left out
    if "" in given.values():
        raise UserError(f"{prog}: an argument is empty: give it a value or leave it out.")
    return model_class.checked(given, prog)


def command(run: Callable[[T], int | None], model_class: type[T], prog: str) -> Command:
    """A command that parses its line, calls `run`, and turns what goes wrong into a sentence and an exit code.

    Codes: `run`'s own (None is 0), 2 for a UserError or a full disk, KeyboardInterrupt's `exit_code` or 130. Any other
    exception is a bug, and keeps its traceback.
    """

    def main(argv: list[str] | None = None) -> int:
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
            return getattr(interrupt, "exit_code", 130)  # 128 + SIGINT, as shells report it

    return main


def choose(prog: str, what: str, commands: Mapping[str, tuple[str, Command]], argv: list[str] | None) -> int:
    """Run the command (name → summary, command) that a line names with the other arguments; else list all."""
    line = sys.argv[1:] if argv is None else argv
    if not line or line[0] in ("-h", "--help"):
        lines = [f"  {name:<{max(map(len, commands))}}  {summary}" for name, (summary, _) in commands.items()]
        usage, end = f"{prog} {what.upper()}", f"`{prog} {what.upper()} --help` lists what one of them takes."
        print("\n".join([f"usage: {usage} [ARGUMENTS]", "", *lines, "", end]))
        return 0
    if line[0] not in commands:
        say(f"error: {unknown(what, line[0], commands)}")
        return 2
    return commands[line[0]][1](line[1:])


class _Parser(ArgumentParser):
    """Raises UserError with one sentence instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}: `{self.prog} --help` lists what is allowed.")


def _shown(name: str, field: FieldInfo) -> str:
    word = field.alias or name  # of a word that Python keeps for itself
    return name if field.json_schema_extra == {"positional": True} else f"--{word.replace('_', '-')}"


def _keywords(name: str, field: FieldInfo) -> dict[str, Any]:
    """What `add_argument` takes; an argument that is not given is left out, for the model to fill in."""
    parts = get_args(field.annotation)
    kind, text = parts[0] if type(None) in parts else field.annotation, field.description or ""
    if not field.is_required() and str(field.default) not in ("None", "False", "()", ""):
        text += f" (default: {field.default})"
    keywords = {"help": text.replace("%", "%%"), "default": SUPPRESS}
    if kind is bool:
        return {**keywords, "action": "store_true"}
    if _shown(name, field) == name:
        return keywords if field.is_required() else {**keywords, "nargs": "?"}
    shown = "{" + ",".join(get_args(kind)) + "}" if get_origin(kind) is Literal else PLACEHOLDERS.get(kind, "TEXT")
    return {**keywords, "metavar": field.title or shown, "action": "append" if get_origin(kind) is tuple else "store"}
