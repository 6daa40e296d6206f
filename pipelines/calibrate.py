"""Fit the reference clock to this device: seconds of a step as a function of shape, and its error.

    python pipelines/calibrate.py --preset tinystories-char        # on an idle machine

Leaves `clock.json`, the constants for a preset's `clock` section, and `summary.json` with every shape that was timed.
"""

import json
import sys
from typing import Annotated

from pydantic import Field

from esper.pipelines.common.arguments import CommonArguments, main_guard
from esper.pipelines.common.run_folder import open_job, resolve_spec
from esper.platform.console import say
from esper.platform.storage import write_json
from esper.workers.calibrate import calibrate


class CalibrateArguments(CommonArguments):
    """Fit the reference clock to this device."""

    steps: Annotated[int, Field(ge=5, description="Timed optimizer steps of each shape.")] = 40


def run(arguments: CalibrateArguments) -> None:
    """Settle, time, fit, report."""
    job = open_job(arguments, resolve_spec(arguments), "calibrate")
    clock, rows = calibrate(job.spec, job.open_data(), steps=arguments.steps)
    say("layers  MLP width  wall ms  formula ms  error")
    for row in rows:
        say(f"{row.layers:6}  {row.mlp_width:9}  {1e3 * row.wall:7.2f}  {1e3 * row.predicted:10.2f}  {row.error:+5.1%}")
    job.begin()
    worst = max(abs(row.error) for row in rows)
    constants = clock.model_dump(exclude={"kind"})
    write_json(job.out / "clock.json", constants)
    write_json(
        job.out / "summary.json",
        {
            "clock": constants,
            "worst_error": worst,
            "shapes": [{**vars(row), "error": row.error} for row in rows],
        },
    )
    say(f"constants for a preset's clock section, worst error {worst:.1%}:")
    print(json.dumps(constants, indent=2))
    say(f"results: {job.out / 'summary.json'}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, CalibrateArguments, "esper calibrate", argv)


if __name__ == "__main__":
    sys.exit(main())
