"""The base of every config model: frozen, unknown keys refused, errors as one sentence."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from esper.platform.errors import UserError, clipped, unknown


class Frozen(BaseModel):
    """A frozen pydantic model that refuses unknown keys, NaN and infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def checked(cls, values: Any, what: str) -> Self:
        """Build from plain values; raises UserError naming the first wrong key of `what` and what is allowed."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _sentence(cls, error, what) from None


def _sentence(cls: type[BaseModel], error: ValidationError, what: str) -> UserError:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return unknown(f"key in {what}", ".".join(path), [".".join([*path[:-1], k]) for k in _keys(cls, path[:-1])])
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # our own sentence names what was wrong
        return UserError(f"{what}: {rule}")
    return UserError(
        f"{what}: {'.'.join(path) or 'value'} is {clipped(first.get('input'))}: {rule[0].lower()}{rule[1:]}."
    )


def _keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = cls.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        cls = annotation
    return list(cls.model_fields)
