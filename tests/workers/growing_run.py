"""A run whose actions depend on its telemetry's own numbers, so that whatever differs in them shows.

As a program, `python growing_run.py SPEC SHARDS FOLDER`: train from the last checkpoint in FOLDER, or from the start,
save at every decision, and write the outcome beside it. For tests that kill it.
"""

import json
import sys
from pathlib import Path

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction
from esper.platform.spec import saved_spec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData


def choose(telemetry):
    """Some legal action."""
    legal = telemetry.legal()
    return GraftAction(int(legal[int(1e6 * abs(telemetry.globals).sum()) % len(legal)]), telemetry.sequence)


def finish(run):
    """Play to the end, from the middle of a slice too."""
    if run.unfinished:
        run.finish()
    while not run.ended:
        run.step(choose(run.telemetry))
    return outcome(run)


def outcome(run):
    """The summary without wall times."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("wall_seconds", "validation_seconds")}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return plain(run.summary())


def main(spec: Path, shards: Path, folder: Path) -> None:
    """See above."""
    run = GrowthRun(saved_spec(spec), TokenData.open(shards))
    with CheckpointStore(folder) as checkpoints:
        if folder.is_dir() and any(folder.glob("[!.]*")):
            run.load(*checkpoints.load("run"))
        else:
            run.reset(seed=5)
        while not run.ended:
            run.step(choose(run.telemetry))
            checkpoints.save("run", *run.state())
    (folder.parent / "outcome.json").write_text(json.dumps(outcome(run)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
