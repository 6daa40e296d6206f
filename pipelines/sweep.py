"""Compare arms at an equal budget: arms × sizes × seeds × a grid, under Ray Tune, with the curves in MLflow.

esper sweep --arms static,tamiyo,ppo --sizes 1,2,3 --seeds 5 --tune-lr      # trains ppo where no --policy is given
esper sweep --resume runs/sweep-20260101-120000                             # what is missing, and no more
"""

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
