"""Look at a trained controller, hold it against the other arms, or boil it down to a schedule. Without Ray.

esper policy evaluate runs/ppo-20260101-120000 --data stories.txt      # on text; without --data on loss laws
"""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from esper.pipelines.common.arguments import CommonArguments, choose, command, flag
from esper.pipelines.sweeps.arms import OPENLOOP, PPO
from esper.platform.frozen import Frozen
from esper.policies.arms import ARMS
from esper.policies.schedule import NAMED

BOUND = "bound"  # the oracle's
PLAYED = (*(arm for arm in ARMS if arm != PPO), OPENLOOP, BOUND)


class InfoArguments(Frozen):
    """Say what a trained policy is."""

    checkpoint: Path = flag(..., "A trained policy: an `esper ppo` run, or a checkpoint in it.", positional=True)


class PlayArguments(InfoArguments):
    """What is played."""

    preset: str | None = flag(None, "A preset's name or a JSON file (default: what it was trained on).", "NAME|FILE")
    instances: Literal["train", "test"] = flag("test", "The instance set.")
    episodes: int | None = flag(None, "Play only the first N instances (default: all; on text, a few).", ge=1)


class FitArguments(Frozen):
    """Fit loss laws to runs, for arm planner: static ones of three sizes at least, and any that grew."""

    runs: Path = flag(..., "A folder of `esper train`, of `esper sweep`, or one with several.", positional=True)
    out: Path = flag(..., "A new file for the laws; must be given.", "FILE")


class EvaluateArguments(PlayArguments, CommonArguments):
    """Play a trained policy and other arms on an instance set, on loss laws or (with --data) on text."""

    arms: str | None = flag(None, f"Of {', '.join(PLAYED)} (default: all to be had but {', '.join(NAMED)}).", "A,B,C")
    schedule: Path | None = flag(None, "For schedule: a JSON list of grafts, not the best on training ones.", "FILE")
    laws: Path | None = flag(None, "For planner: fitted laws; on loss laws, draws of the preset's without it.", "FILE")


class DistillArguments(PlayArguments):
    """Write a trained policy's median schedule over an instance set of loss laws."""

    out: Path = flag(..., "A new file for the schedule; must be given.", "FILE")
    instances: Literal["train", "test"] = flag("train", "The instance set.")
    seed: int = flag(0, "Seed of every random stream; 0 or more.", ge=0)
    set: tuple[str, ...] = flag((), "Change one value of the preset; may be given again for others.", "KEY.PATH=VALUE")


ACTIONS: dict[str, tuple[type[Frozen], str]] = {
    "info": (InfoArguments, "say what a trained policy is"),
    "evaluate": (EvaluateArguments, "play it and the other arms on an instance set"),
    "distill": (DistillArguments, "write its median schedule as JSON"),
    "fit": (FitArguments, "fit loss laws to runs, for arm planner"),
}


def run(action: str, arguments: Any) -> None:
    """Do one of the actions, whose module imports torch."""
    getattr(import_module("esper.pipelines.controllers.policy_actions"), action)(arguments)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    actions = {
        name: (summary, command(partial(run, name), model, f"esper policy {name}"))
        for name, (model, summary) in ACTIONS.items()
    }
    return choose("esper policy", "action", actions, argv)


if __name__ == "__main__":
    sys.exit(main())
