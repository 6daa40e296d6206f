"""Fit the reference clock on an idle machine; leaves `clock.json`, for a preset, and `summary.json` with timings."""

import json
import sys

from esper.pipelines.common.arguments import CommonArguments, command, flag
from esper.platform.console import say
from esper.platform.storage import write_json


class CalibrateArguments(CommonArguments):
    """Fit the reference clock to this device."""

    steps: int = flag(40, "Timed optimizer steps of each shape.", ge=5)


def run(arguments: CalibrateArguments) -> None:
    """Time, fit, report."""
    from esper.pipelines.common.preset import resolve_spec
    from esper.pipelines.common.run_folder import RunFolder
    from esper.workers.calibrate import calibrate

    folder = RunFolder.new(arguments, resolve_spec(arguments), "calibrate")
    clock, rows = calibrate(folder.spec, folder.tokens, steps=arguments.steps)
    say("layers      width  wall ms  formula ms  error")
    for row in rows:
        wall, formula = 1e3 * row["wall"], 1e3 * row["predicted"]
        say(f"{row['layers']:6}  {row['width']:9}  {wall:7.2f}  {formula:10.2f}  {row['error']:+5.1%}")
    constants, worst = clock.model_dump(exclude={"kind"}), max(abs(row["error"]) for row in rows)
    summary = {"clock": constants, "worst_error": worst, "shapes": rows}
    files = {"spec": folder.spec.model_dump(mode="json"), "clock": constants, "summary": summary}
    for name, content in files.items():
        write_json(folder.out / f"{name}.json", content)
    say(f"constants for a preset's clock section, worst error {worst:.1%}:")
    print(json.dumps(constants, indent=2))
    say(f"results: {folder.out / 'summary.json'}")


main = command(run, CalibrateArguments, "esper calibrate")

if __name__ == "__main__":
    sys.exit(main())
