"""Fitted scaling laws as a file: an ensemble of them, what they were fitted to, and how well they fit it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.platform.errors import UserError
from esper.platform.frozen import Count, Frozen, NotNegative, Positive
from esper.platform.host_spec import Host
from esper.platform.spec import LawSpec, RunSpec
from esper.platform.storage import read_json

FIT = "esper policy fit RUNS --out FILE"  # the command that makes one

# What a law is made of: the fields of `ScalingLaw` (`workers/laws/scaling_law.py`); one number a member.
CONSTANTS = (*LawSpec.model_fields, "reference", "tokens")
Constants = Annotated[tuple[NotNegative, ...], Field(min_length=1, max_length=1024)]


class FittedLaws(Frozen):
    """What `esper policy fit` writes. Losses in nats per token."""

    version: Literal[1] = 1
    preset: str
    tokenizer: str
    host: Host  # of the runs; their layers and widths differ
    text: str  # fingerprint of theirs; empty for none
    folder: str = ""  # where they are, for laws to be fitted anew with others
    runs: int  # that they were fitted to,
    grown: int  # of which so many grew,
    losses: int  # by so many annealed losses
    command: str
    residual: NotNegative  # root mean square over these,
    held_out: NotNegative | None = None  # and over growing runs whose seed was left out
    # A loss at a decision, before the rate decays, is `offset + factor × the law's`, and two Gaussian errors:
    offset: float = 0.0
    factor: Positive = 1.0
    noise: Positive  # standard deviation of each decision's own,
    misfit: NotNegative  # and of that which a run's decisions share
    # Of each run: tokens of its first slice, and the sum of both errors at evenly spaced decisions, start and end too.
    errors: tuple[tuple[Positive, Annotated[tuple[float, ...], Field(min_length=2)]], ...] = ()
    vocab_size: Count | None = None
    ensemble: dict[str, Constants]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if wrong := {*CONSTANTS} ^ self.ensemble.keys():
            lacks = ", ".join(sorted(wrong))
            raise ValueError(f"its ensemble lacks {lacks}, or knows more: fit it again, with `{FIT}`.")
        if len({len(values) for values in self.ensemble.values()}) > 1:
            raise ValueError("its ensemble's constants are not of equally many members.")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        name = f"--laws {path}"
        return cls.checked(read_json(path, name, f"a file that `{FIT}` wrote"), name)

    def check(self, spec: RunSpec) -> None:
        """Raise UserError where they are of another preset or kind of token than a run's."""
        pairs = {"preset": (self.preset, spec.preset), "tokenizer": (self.tokenizer, spec.data.encoding)}
        for what, (own, its) in pairs.items():
            if own != its:
                told = f"the laws were fitted to runs of {what} {own!r}, and this one is of {its!r}"
                raise UserError(f"{told}: fit others, with `{FIT}`, to runs of that {what}.")

    def unlike(self, spec: RunSpec, text: str) -> list[str]:
        """What differs, but forbids nothing."""
        fields = [name for name in type(spec.host).model_fields if name not in ("n_layer", "layers")]
        own, its = self.host, spec.host
        found = [f"host.{name}" for name in fields if getattr(own, name, None) != getattr(its, name)]
        return found + (["the text"] if text != self.text else [])
