"""The whole story in minutes on a laptop: prepare text, train a gardener, compare arms, draw the picture.

    make demo            or            python pipelines/demo.py

A demo this short does not train a good policy: it shows that everything works together.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from esper.pipelines.arguments import main_guard
from esper.pipelines.gardener import gpus_needed, train_gardener
from esper.pipelines.job import open_job, resolve_spec
from esper.pipelines.sweep import TRAINING_SEED, SweepArguments, compare, parse_arms
from esper.platform import cluster
from esper.platform.console import duration, say


class DemoArguments(SweepArguments):
    """The whole story in minutes on a laptop."""

    arms: str = Field("static,tamiyo,ppo", title="A,B,C", description="Arms to compare.")


def run(arguments: DemoArguments) -> int:
    """Prepare, train, compare."""
    begun = time.perf_counter()
    say("Esper's demo: about 2 minutes on 2 cores. It does not train a good policy; that takes hours.")
    say("1 of 3  preparing text, some seconds")
    arguments = arguments.model_copy(update={"preset": arguments.preset or "demo"})
    spec = resolve_spec(arguments)
    arms, inputs = parse_arms(arguments, spec)
    job = open_job(arguments, spec, "demo")
    with cluster.session(gpus=gpus_needed(spec)):
        job.begin()
        if "ppo" in arms and inputs.policy is None:
            say(f"2 of 3  training a gardener with PPO, about a minute and a half; {_so_far(begun)}")
            trained = train_gardener(job, job.out / "ppo", seed=TRAINING_SEED + arguments.seed)
            inputs = replace(inputs, policy=Path(trained["checkpoint"]))
        say(f"3 of 3  comparing {', '.join(arms)}, about half a minute; {_so_far(begun)}")
        code = compare(job, arms, arguments, inputs)
    say(f"done in {duration(time.perf_counter() - begun)}; remember that a demo this short trains no good policy")
    return code


def _so_far(begun: float) -> str:
    return f"{duration(time.perf_counter() - begun)} so far"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, DemoArguments, "esper demo", argv)


if __name__ == "__main__":
    sys.exit(main())
