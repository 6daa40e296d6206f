"""Train one GPT under one arm.

esper train tamiyo --data stories.txt --set budget.decisions=12
esper train --resume runs/train-tamiyo-20260101-120000      # to the same numbers; Ctrl-C and SIGTERM save first
"""

import sys
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from esper.pipelines.common.arguments import Positional, ResumableArguments, main_guard
from esper.platform.errors import UserError
from esper.policies.arms import ALIASES, ARMS, arm_name

USED_BY = {"policy": "ppo", "schedule": "schedule", "match": "random"}  # what is given → the arm it is for


class TrainArguments(ResumableArguments):
    """Train one GPT under one arm."""

    arm: Positional[str] = Field(default="static", description=f"One of {', '.join([*ARMS, *ALIASES])}.")
    policy: Annotated[Path | None, Field(description="For ppo: a policy that `esper ppo` trained.")] = None
    schedule: Annotated[Path | None, Field(title="FILE", description="For schedule: a JSON list of grafts.")] = None
    match: Annotated[
        Path | None,
        Field(title="FILE", description="For random: a summary.json, to graft as often and the same kinds."),
    ] = None

    @model_validator(mode="after")
    def _uses_what_is_given(self) -> Self:
        arm = arm_name(self.arm)
        for name, user in USED_BY.items():
            if getattr(self, name) is not None and arm != user:
                raise UserError(f"--{name} is for arm {user!r}, and {arm!r} does not use it: leave it out.")
        return self


def run(arguments: TrainArguments) -> int:
    """Settle, train, report; returns 1 if the run was given up."""
    from esper.pipelines.common import single_run

    if arguments.resume is not None:
        return single_run.resume(arguments.resume)
    files = {name: getattr(arguments, name) for name in USED_BY}
    return single_run.begin(arguments, arm_name(arguments.arm), files)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, TrainArguments, "esper train", argv)


if __name__ == "__main__":
    sys.exit(main())
