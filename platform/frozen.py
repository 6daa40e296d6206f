"""What config models and command lines are made of: a frozen base whose errors are one sentence, bounded numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError

from esper.platform.errors import UserError, clipped, unknown

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[int, Field(ge=1, le=512)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Neurons = Annotated[int, Field(ge=1, le=2**20)]
Batch = Annotated[int, Field(ge=8, le=2**20)]
Share = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """A frozen pydantic model that refuses unknown keys, NaN and infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def checked(cls, values: Any, what: str) -> Self:
        """Build from plain values; raises UserError naming the first wrong key of `what` and what is allowed."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        path, fields = _place(cls, first["loc"])
        name, rule = ".".join(map(str, path)) or "it", first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise unknown(f"key in {what}", name, [".".join(map(str, [*path[:-1], key])) for key in fields])
        if first["type"] in ("value_error", "unknown_kind"):  # our own sentence names what was wrong
            raise UserError(f"{what}: {name}: {rule}" if path else f"{what}: {rule}")
        found = "missing" if first["type"] == "missing" else clipped(first.get("input"))
        raise UserError(f"{what}: {name} is {found}: {rule[0].lower()}{rule[1:]}.")


def _place(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[int | str], Iterable[str]]:
    """A key's path without the tags of unions that pydantic puts into it, and the fields beside it."""
    path: list[int | str] = []
    there, fields = [model], dict[str, Any]()
    for part in loc:
        by_kind = {m.model_fields["kind"].default: m for m in there if len(there) > 1 and "kind" in m.model_fields}
        if part in by_kind:
            there = [by_kind[part]]
            continue
        path.append(part)
        if isinstance(part, str):
            fields = there[0].model_fields if there else {}
            there = _models(fields[part].annotation) if part in fields else []
    return path, fields


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Those that may be at a place of this type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def by_kind(default: str, *others: str) -> Discriminator:
    """Tells the members of a union by their `kind`; what has none is of the default's."""

    def kind(value: Any) -> str:
        return str(value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", default))

    known = " or ".join(map(repr, (default, *others)))
    return Discriminator(kind, custom_error_type="unknown_kind", custom_error_message=f"its kind must be {known}.")
