"""What the tests of runs share: actions by name, and a run whose actions depend on its telemetry's own numbers.

As a program, `python growing_run.py SPEC SHARDS FOLDER`: train from the checkpoint in FOLDER, or from the start, save
at every decision, and write the outcome beside it. For tests that kill it.
"""

import json
import sys
from pathlib import Path

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction
from esper.platform.spec import saved_spec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData


def changed(spec, **parts):
    """The spec with fields of its parts changed: `changed(spec, budget={"amount": 40})`."""
    return spec.model_copy(update={name: getattr(spec, name).model_copy(update=v) for name, v in parts.items()})


def act(run, blueprint=None, site=None, operation="graft"):
    """Graft (or prune) a blueprint, at a site or at the first that allows it; without one, wait."""
    rows = [
        i
        for i, action in enumerate(run.telemetry.actions)
        if (action.operation, action.blueprint) == (operation, blueprint) and site in (None, action.site)
    ]
    return run.step(GraftAction(rows[0] if blueprint else 0, run.telemetry.sequence))


def play(run, plan=()):
    """From where it stands to its end, grafting `plan[decision]` and otherwise waiting; returns every observation."""
    seen = [run.telemetry]
    while not run.ended:
        seen.append(act(run, dict(plan).get(run.sequence)).telemetry)
    return seen


def choose(telemetry):
    """Some legal action."""
    legal = telemetry.legal()
    return GraftAction(int(legal[int(1e6 * abs(telemetry.globals).sum()) % len(legal)]), telemetry.sequence)


def finish(run):
    """Play `choose` to the end, from the middle of a slice too."""
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
