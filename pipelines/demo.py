"""The whole story in minutes on a laptop: prepare text, train a controller, compare arms, write the report.

    make demo            or            python pipelines/demo.py

A demo this short does not train a good policy: it shows that everything works together.
"""

import sys
import time

from pydantic import Field

from esper.pipelines.common.arguments import main_guard
from esper.pipelines.common.run_folder import open_job
from esper.pipelines.sweep import SweepArguments, compare, resume, settle
from esper.platform.console import duration, say


class DemoArguments(SweepArguments):
    """The whole story in minutes on a laptop."""

    arms: str = Field(default="static,tamiyo,ppo", title="A,B,C", description="Arms to compare.")


def run(arguments: DemoArguments) -> int:
    """Prepare, train, compare."""
    if arguments.resume is not None:
        return resume(arguments, arguments.resume)
    begun = time.perf_counter()
    say("Esper's demo: about 2 minutes on 2 cores. It does not train a good policy; that takes hours.")
    say("1 of 2  preparing text, some seconds")
    plan, spec = settle(arguments.model_copy(update={"preset": arguments.preset or "demo"}))
    job = open_job(arguments, spec, "demo")
    say(f"2 of 2  training a controller with PPO, about a minute and a half, then comparing; {_so_far(begun)}")
    code = compare(job, plan.model_copy(update={"data": job.data}))
    say(f"done in {duration(time.perf_counter() - begun)}; remember that a demo this short trains no good policy")
    return code


def _so_far(begun: float) -> str:
    return f"{duration(time.perf_counter() - begun)} so far"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, DemoArguments, "esper demo", argv)


if __name__ == "__main__":
    sys.exit(main())
