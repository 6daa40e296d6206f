"""Look at a trained controller, hold it against the other arms, or boil it down to a schedule. Without Ray.

esper policy evaluate runs/ppo-20260101-120000 --data stories.txt      # on text; without --data on loss laws
esper policy distill runs/ppo-20260101-120000 --out plan.json          # for `esper train schedule --schedule …`
"""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from esper.pipelines.common.arguments import Arguments, CommonArguments, Positional, choose, main_guard

ARMS = ("static", "random", "tamiyo", "lag", "schedule", "openloop", "bound")
SETS = Literal["train", "test"]


class InfoArguments(Arguments):
    """Say what a trained policy is."""

    checkpoint: Positional[Path] = Field(description="A trained policy: an `esper ppo` run, or a checkpoint in it.")


class PlayArguments(InfoArguments):
    """What is played."""

    preset: Annotated[
        str | None,
        Field(title="NAME|FILE", description="A preset's name or a JSON file (default: what it was trained on)."),
    ] = None
    instances: Annotated[SETS, Field(description="The instance set: train, or test.")] = "test"
    episodes: Annotated[int | None, Field(ge=1, description="Play only the first N instances of the set.")] = None


class EvaluateArguments(PlayArguments, CommonArguments):
    """Play a trained policy and other arms on an instance set, on loss laws or (with --data) on text."""

    arms: Annotated[
        str | None, Field(title="A,B,C", description=f"Of {', '.join(ARMS)} (default: all that can be had).")
    ] = None
    schedule: Annotated[
        Path | None,
        Field(
            title="FILE", description="For schedule: a JSON list of grafts, instead of the best on training instances."
        ),
    ] = None


class DistillArguments(PlayArguments):
    """Write a trained policy's median schedule over an instance set of loss laws."""

    out: Annotated[Path, Field(title="FILE", description="A new file for the schedule; must be given.")]
    instances: Annotated[SETS, Field(description="The instance set: train, or test.")] = "train"
    seed: Annotated[int, Field(ge=0, description="Seed of every random stream; 0 or more.")] = 0
    set: Annotated[
        list[str],
        Field(title="KEY.PATH=VALUE", description="Change one value of the preset; may be given again for others."),
    ] = []  # noqa: RUF012  (pydantic copies it)


ACTIONS: dict[str, tuple[type[Arguments], str]] = {
    "info": (InfoArguments, "say what a trained policy is"),
    "evaluate": (EvaluateArguments, "play it and the other arms on an instance set"),
    "distill": (DistillArguments, "write its median schedule as JSON"),
}


def run(action: str, arguments: Any) -> None:
    """Do one of the actions, whose module imports torch."""
    getattr(import_module("esper.pipelines.controllers.policy_actions"), action)(arguments)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    actions = {
        name: (summary, partial(main_guard, partial(run, name), model, f"esper policy {name}"))
        for name, (model, summary) in ACTIONS.items()
    }
    return choose("esper policy", "action", actions, argv)


if __name__ == "__main__":
    sys.exit(main())
