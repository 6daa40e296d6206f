"""A run of `esper train`, under way or ended, as a picture: its loss over the budget, and its network as it grew."""

import sys
from pathlib import Path

from esper.pipelines.common.arguments import command, flag
from esper.platform.console import counted, say
from esper.platform.frozen import Frozen


class WatchArguments(Frozen):
    """Draw a run, under way or ended: its loss over the budget, and its network as it grew."""

    run: Path = flag(..., "The output folder of `esper train`.", positional=True)
    gif: bool = flag(False, "An animation, a frame a decision, instead of the last frame.")
    out: Path | None = flag(None, "Default: growth.png or growth.gif in the run's folder.", "FILE")


def run(arguments: WatchArguments) -> None:
    """Read, draw, say where."""
    from esper.pipelines.reports.growth_picture import Growth, save_animation, save_picture

    growth = Growth.read(arguments.run)
    out = arguments.out or arguments.run / f"growth.{'gif' if arguments.gif else 'png'}"
    (save_animation if arguments.gif else save_picture)(growth, out)
    say(f"run     {growth.title}: {growth.told(-1)}, after {counted(len(growth.curve) - 1, 'decision')}")
    say(f"wrote   {out.resolve()}")


main = command(run, WatchArguments, "esper watch")

if __name__ == "__main__":
    sys.exit(main())
