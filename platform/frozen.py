"""What config models and command lines are made of: a frozen base whose errors are one sentence, bounded numbers."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

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

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        """With the keys that there are, which pydantic's own error leaves out."""
        if isinstance(values, Mapping) and cls.model_config.get("extra") == "forbid":
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in values:
                if key not in known:
                    raise PydanticCustomError("unknown_key", "unknown", {"key": str(key), "known": known})
        return values

    @classmethod
    def checked(cls, values: Any, what: str) -> Self:
        """Build from plain values; raises UserError naming the first wrong key of `what` and what is allowed."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        path, rule = [*map(str, first["loc"])], first["msg"].removeprefix("Value error, ")
        if first["type"] == "unknown_key":
            told = first.get("ctx", {})
            known = [".".join([*path, key]) for key in told["known"]]
            raise unknown(f"key in {what}", ".".join([*path, told["key"]]), known)
        if first["type"] == "value_error":  # our own sentence names what was wrong
            raise UserError(": ".join(filter(None, [what, ".".join(path), rule])))
        found = "missing" if first["type"] == "missing" else clipped(first.get("input"))
        raise UserError(f"{what}: {'.'.join(path) or 'it'} is {found}: {rule[0].lower()}{rule[1:]}.")


def by_kind(default: type[Frozen], *others: type[Frozen]) -> BeforeValidator:
    """Reads a member of a union by its `kind`; what has none is of the default's."""
    models = {model.model_fields["kind"].default: model for model in (default, *others)}

    def read(value: Any) -> Any:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        model = default if kind is None else models.get(str(kind))
        if model is None:
            raise ValueError(f"its kind must be {' or '.join(map(repr, models))}.")
        return value if isinstance(value, Frozen) else model.model_validate(value)

    return BeforeValidator(read)
