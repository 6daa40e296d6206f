"""Compare arms at an equal budget: arms × sizes × seeds × a grid, under Ray Tune, with the curves in MLflow.

    python pipelines/sweep.py --arms static,tamiyo --sizes 1,2,3 --seeds 5
    esper sweep --arms static,onejump,gradual,tamiyo --sizes 1,2,3,4 --seeds 5 --tune-lr
    esper sweep --arms static,tamiyo,ppo --policy runs/ppo-20260101-120000
    esper sweep --arms static,ppo                   # no policy given: trains one first, on the same spec; without a
                                                    # GPU the preset is then `demo`
    esper sweep --resume runs/sweep-20260101-120000 # go on where it was stopped or killed: what is missing, and no more

Leaves `sweep.json` (plan, what was chosen on tuning seeds, every trial's state), `summary.json` (a list of the test
runs' summaries), a folder per trial, and the report (`esper report`); in MLflow a parent run with a child per trial.
"""

import sys

from esper.pipelines.common.arguments import main_guard
from esper.pipelines.sweeps.plan import SweepArguments


def run(arguments: SweepArguments) -> int:
    """Run the trials, and report; 1 if a trial failed."""
    from esper.pipelines.sweeps import comparison

    return comparison.begin(arguments) if arguments.resume is None else comparison.resume(arguments.resume)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, SweepArguments, "esper sweep", argv)


if __name__ == "__main__":
    sys.exit(main())
