"""The whole story in minutes on a laptop; a demo this short does not train a good policy."""

import shutil
import sys
import time
from pathlib import Path

from esper.pipelines.common.arguments import command, flag
from esper.pipelines.sweeps.plan import SweepArguments
from esper.platform.console import duration, say


class DemoArguments(SweepArguments):
    """The whole story in minutes on a laptop."""

    preset: str | None = flag("demo", "A preset's name or a JSON file.", "NAME|FILE")
    arms: str = flag("static,twice,tamiyo,ppo", "Arms to compare.", "A,B,C")
    sizes: str | None = flag("1,1x128,2", "Static sizes: layers, or layers x MLP width.", "1,2x96")
    budgets: str | None = flag("30000,90000", "Compare at each of these budgets, and over all of them.", "A,B")
    seeds: str = flag("2", "Test seeds of each arm; auto:N adds some.", "N|auto:N")
    tuning_seeds: int = flag(1, "Other seeds, that sizes and schedules are chosen on.", ge=0, le=100)


def run(arguments: DemoArguments) -> int:
    """Prepare, train, compare."""
    from esper.pipelines.sweeps import comparison

    if arguments.resume is not None:
        return comparison.resume(arguments.resume)
    begun = time.perf_counter()
    say("Esper's demo: prepares text, trains a controller with PPO, and compares arms, in about 3 minutes on 2 cores.")
    code = comparison.begin(arguments, "demo")
    told = duration(time.perf_counter() - begun)
    say(f"done in {told}; a demo this short does not train a good policy: that takes hours")
    if shutil.which("esper") is None:  # after `make demo`
        say(f"for the commands above: source {Path(sys.prefix, 'bin', 'activate')}")
    return code


main = command(run, DemoArguments, "esper demo")

if __name__ == "__main__":
    sys.exit(main())
