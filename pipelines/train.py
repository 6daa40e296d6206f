"""Train one GPT under one arm.

esper train tamiyo --data stories.txt --set budget.decisions=12
esper train --resume runs/train-tamiyo-20260101-120000      # to the same numbers; Ctrl-C and SIGTERM save first
"""

import sys
from pathlib import Path
from typing import Self

from pydantic import model_validator

from esper.pipelines.common.arguments import ResumableArguments, command, flag
from esper.policies.arms import ALIASES, ARMS, NEEDS, arm_name

USED_BY = {name: arm for arm, (name, _) in NEEDS.items()} | {"match": "random"}  # what is given → the arm it is for


class TrainArguments(ResumableArguments):
    """Train one GPT under one arm."""

    arm: str = flag("static", f"One of {', '.join([*ARMS, *ALIASES])}, or module:object of your own.", positional=True)
    policy: Path | None = flag(None, "For ppo: a policy that `esper ppo` trained.")
    schedule: Path | None = flag(None, "For schedule: a JSON list of grafts.", "FILE")
    match: Path | None = flag(None, "For random: a summary.json, to graft as often and the same kinds.", "FILE")
    laws: Path | None = flag(None, "For planner: loss laws that `esper policy fit` fitted.", "FILE")
    weights: Path | None = flag(None, "A trained GPT-2 to start with, as transformers saves one.", "DIR", alias="from")

    @model_validator(mode="after")
    def _uses_what_is_given(self) -> Self:
        arm = arm_name(self.arm)
        for name, user in USED_BY.items():
            if getattr(self, name) is not None and arm != user:
                raise ValueError(f"--{name} is for arm {user!r}, and {arm!r} does not use it: leave it out.")
        return self


def run(arguments: TrainArguments) -> int:
    """Settle, train, report; returns 1 if the run was given up."""
    from esper.pipelines.common import single_run

    if arguments.resume is not None:
        return single_run.resume(arguments.resume)
    files = {name: getattr(arguments, name) for name in USED_BY}
    if arguments.weights is not None:
        files |= {"config": arguments.weights / "config.json", "model": arguments.weights / "model.safetensors"}
    return single_run.begin(arguments, arm_name(arguments.arm), files)


main = command(run, TrainArguments, "esper train")

if __name__ == "__main__":
    sys.exit(main())
