"""Every key that `--set` takes: default, what is allowed, meaning, from the spec's models and the comments in them."""

import inspect
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from textwrap import dedent
from typing import Any, NamedTuple, get_args

from pydantic import TypeAdapter

from esper.pipelines.common.arguments import command, flag
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.spec import RunSpec

BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


class SettingsArguments(Frozen):
    """List the keys of --set."""

    key: str = flag("", "Only those that begin so, such as growth (default: all).", positional=True)


class Setting(NamedTuple):
    """One key."""

    key: str  # with dots, and [] for an element of a list
    default: str  # as JSON; empty where it must be given
    allowed: str
    meaning: str


class Group(NamedTuple):
    """The keys of one model."""

    key: str  # what theirs begin with; empty for a run's own
    kind: str  # of the model, where the key takes several (`host.kind`), else empty
    about: str  # its docstring
    settings: list[Setting]


def groups() -> Iterator[Group]:
    """All keys, model by model."""
    from esper.workers.kasmina.registry import make_blueprints  # torch takes a second

    yield from _groups(RunSpec)
    for name, blueprint in make_blueprints().items():
        if type(blueprint).__module__.startswith("esper."):  # no plug-in's
            yield from _groups(type(blueprint), f"growth.blueprints.{name}")


def _groups(model: Any, prefix: str = "") -> Iterator[Group]:
    schema, source = TypeAdapter(model).json_schema(), dedent(inspect.getsource(model))
    remarks, lines = comments(source), source.splitlines()
    own, inner = [], []
    for name, value in schema["properties"].items():
        key = f"{prefix}.{name}".lstrip(".")
        field = getattr(model, "model_fields", {}).get(name)
        models, several = _models(field.annotation if field else None)
        inner += [(each, key + several) for each in models]
        if not models or several:
            [at] = [at for at, line in enumerate(lines, start=1) if line.startswith(f"    {name}:")]
            default = json.dumps(value["default"]) if "default" in value else ""
            own.append(Setting(key, default, _allowed(value), value.get("description") or remarks.get(at, "")))
    kind = schema["properties"].get("kind", {}).get("const", "")
    yield Group(prefix, kind, inspect.getdoc(model) or "", own)
    for each, key in inner:
        yield from _groups(each, key)


def _models(annotation: Any) -> tuple[list[type[Frozen]], str]:
    """The models in a field's type, and [] where it is a list of them."""
    if inspect.isclass(annotation) and issubclass(annotation, Frozen):
        return [annotation], ""
    found = [_models(each) for each in get_args(annotation)]
    several = "[]" if getattr(annotation, "__origin__", None) is tuple or any(mark for _, mark in found) else ""
    return [model for models, _ in found for model in models], several


def _allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return " or ".join(json.dumps(word) for word in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"[{', '.join(map(_allowed, schema['prefixItems']))}]"
    if "items" in schema:
        return f"list of {_allowed(schema['items'])}"
    bounds = [words.format(f"{schema[name]:,}") for name, words in BOUNDS.items() if name in schema]
    return " ".join([TYPES.get(schema.get("type", ""), "object"), " and ".join(bounds)]).strip()


def comments(source: str) -> dict[int, str]:
    """Line → the comment behind its code, or else the one that fills the lines before it."""
    found: dict[int, str] = {}
    above: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, text = token.start[0], token.string.lstrip("# ")
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            above.append(text)
        elif token.type == tokenize.COMMENT:
            found[line] = text
        elif token.type != tokenize.NL or not token.line.strip():  # code, or an empty line
            if above and token.string.strip():
                found[line] = " ".join(above)
            if token.type not in (tokenize.INDENT, tokenize.DEDENT):
                above = []
    return found


def run(arguments: SettingsArguments) -> None:
    """Print a line a key."""
    every = [setting for group in groups() for setting in group.settings]
    chosen = [setting for setting in every if setting.key.startswith(arguments.key)]
    if not chosen:
        raise UserError(f"no key begins with {arguments.key!r}: `esper settings` lists all.")
    for key, default, allowed, meaning in chosen:
        print(f"{key}{default and ' = '}{default}  ({allowed})  {meaning}".rstrip())


main = command(run, SettingsArguments, "esper settings")

if __name__ == "__main__":
    sys.exit(main())
