"""The base of every config model and command line: frozen, unknown keys refused, errors as one sentence."""

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
            first = error.errors(include_url=False)[0]
        path, rule = first["loc"], first["msg"].removeprefix("Value error, ")
        name = ".".join(map(str, path)) or "it"
        if first["type"] == "extra_forbidden":
            fields: Any = cls.model_fields
            for part in path[:-1]:
                fields = getattr(getattr(fields.get(part), "annotation", None), "model_fields", {})
            raise unknown(f"key in {what}", name, [".".join(map(str, [*path[:-1], key])) for key in fields])
        if first["type"] == "value_error":  # our own sentence names what was wrong
            raise UserError(f"{what}: {name}: {rule}" if path else f"{what}: {rule}")
        found = "missing" if first["type"] == "missing" else clipped(first.get("input"))
        raise UserError(f"{what}: {name} is {found}: {rule[0].lower()}{rule[1:]}.")
