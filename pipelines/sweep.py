"""Compare arms at an equal budget: arms × sizes × seeds × a grid, under Ray Tune, with the curves in MLflow."""

import sys

from esper.pipelines.common.arguments import command
from esper.pipelines.sweeps.plan import SweepArguments


def run(arguments: SweepArguments) -> int:
    """Run the trials, and report; returns 1 if a trial failed."""
    from esper.pipelines.sweeps import comparison

    return comparison.begin(arguments) if arguments.resume is None else comparison.resume(arguments.resume)


main = command(run, SweepArguments, "esper sweep")

if __name__ == "__main__":
    sys.exit(main())
